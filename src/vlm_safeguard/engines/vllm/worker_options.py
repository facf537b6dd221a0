"""How an engine is started whose workers read and edit states for a guard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vlm_safeguard.engines.vllm.marks import KEY, EditSettings, Settings
from vlm_safeguard.engines.vllm.plain import to_bytes
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.errors import SafeguardError

WORKER = "vlm_safeguard.engines.vllm.worker.GuardedWorker"
BEGINNING = "vlm_safeguard.engines.vllm.beginning:Beginning"


def worker_options(judge: Judge) -> dict[str, Any]:
    """VLLM's engine arguments by name; none where no worker reads or edits.

    The policy's sha256 is among them: vLLM keeps compiled graphs by its `additional_config`, and
    not by what its workers put into them.
    """
    if not judge.layers:
        return {}
    policy, edit = judge.policy, None
    if policy.edits:
        edit = EditSettings(edit=policy.edit.to_config(), layers=policy.layers, rank=policy.rank)
    settings = Settings(policy=judge.sha256, layers=judge.layers, edit=edit)
    # how far an answer follows a refusal is known where each token is, before the next is begun
    steps = {"async_scheduling": False} if policy.edits else {}
    return steps | {
        "worker_cls": WORKER,
        "additional_config": {KEY: settings.model_dump(mode="json")},
        "logits_processors": [BEGINNING],
    }


def subspaces(judge: Judge) -> dict[str, list[bytes]]:
    """Layer → its `Subspace`, in float32 bytes: what workers edit in, given before they edit."""
    made = judge.policy.subspaces(torch.device("cpu"), torch.float32)
    return {
        str(number): [to_bytes(x) for x in (each.V, each.harmful, each.drift)]
        for number, each in made.items()
    }


def check_given(judge: Judge, layers: Iterable[Iterable[int]]) -> None:
    """Refuse workers that do not have all the layers that are edited.

    Args:
        layers: of each worker, those that it was given subspaces for.

    Raises:
        SafeguardError: some are missing.
    """
    present = {number for each in layers for number in each}
    if present != set(judge.policy.layers):
        raise SafeguardError(
            f"Of the layers {list(judge.policy.layers)} that this guard edits, vLLM's workers have "
            f"{sorted(present)}."
        )
