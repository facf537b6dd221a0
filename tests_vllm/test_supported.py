"""What the guard was not tested with does not start: vLLM's own configurations are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_server import serving
from vlm_safeguard import Guard
from vlm_safeguard.engines.vllm.supported import check_config
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.engines.vllm.worker_options import worker_options
from vlm_safeguard.errors import SafeguardError

pytestmark = pytest.mark.xdist_group("pocket")  # they share a checkpoint and its guard


def checked(model: Path, guard: Guard, **options: Any) -> None:
    judge = Judge(guard.policy)
    given = {"enforce_eager": True, "max_model_len": 256, "dtype": "float32", **options}
    config = EngineArgs(str(model), **worker_options(judge) | given).create_engine_config()
    check_config(config, judge, guard.provenance)


def test_the_plain_engine_is_supported(checkpoints: tuple[Path, Path], guard: Guard) -> None:
    checked(checkpoints[0], guard)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_lora": True}, "LoRA adapters"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"logprobs_mode": "processed_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"max_logprobs": 1}, "--max-logprobs"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "a connector that moves keys and values",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_configurations_are_refused(
    checkpoints: tuple[Path, Path], guard: Guard, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SafeguardError, match=words):
        checked(checkpoints[0], guard, **options)


def test_the_server_ends_with_the_reason(folder: Path, checkpoints: tuple[Path, Path]) -> None:
    model, guard = checkpoints
    refused = serving(model, folder / "refused.log", "--api-server-count", "2", guard=guard)
    with pytest.raises(SafeguardError, match="not tested with --api-server-count"):
        refused.__enter__()
