"""How an engine is started whose workers read states for a guard."""

from __future__ import annotations

from typing import Any

from vlm_safeguard.engines.vllm.marks import KEY, Settings
from vlm_safeguard.engines.vllm.verdict import Judge

WORKER = "vlm_safeguard.engines.vllm.worker.GuardedWorker"
BEGINNING = "vlm_safeguard.engines.vllm.beginning:Beginning"


def worker_options(judge: Judge) -> dict[str, Any]:
    """VLLM's engine arguments by name; none where no worker reads anything.

    The policy's sha256 is among them: vLLM keeps compiled graphs by its `additional_config`, and
    not by what its workers put into them.
    """
    if not judge.layers:
        return {}
    settings = Settings(policy=judge.sha256, layers=judge.layers)
    return {
        "worker_cls": WORKER,
        "additional_config": {KEY: settings.model_dump(mode="json")},
        "logits_processors": [BEGINNING],
    }
