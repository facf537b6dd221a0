"""What of vLLM the guard was tested with; all else is refused before it starts."""

from __future__ import annotations

from typing import Any

from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.engines.vllm.worker_options import worker_options
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.identity import check_same
from vlm_safeguard.policy.artifact import Provenance

TESTED = ("0.32.0",)


def check_version(version: str) -> None:
    """Refuse a release of vLLM that the guard was not tested with.

    Raises:
        SafeguardError: and which it was tested with.
    """
    if version.partition("+")[0] not in TESTED:
        raise SafeguardError(
            f"This is vLLM {version}; the guard was tested with {', '.join(TESTED)} alone, and "
            "another may have ways around it. Install that."
        )


def check_config(config: Any, judge: Judge, provenance: Provenance) -> None:
    """Refuse an engine that the guard was not tested in, or another model than its own.

    Args:
        config: a `VllmConfig`.

    Raises:
        SafeguardError: what is in the way.
    """
    model, parallel = config.model_config, config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "a connector that moves keys and values": config.kv_transfer_config is not None,
        "a connector that moves encoders' outputs": config.ec_transfer_config is not None,
        "prompt embeddings (--enable-prompt-embeds)": model.enable_prompt_embeds,
        "an encoder-decoder model": model.is_encoder_decoder,
        "another runner than that for answers": model.runner_type != "generate",
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "dual-batch overlap": parallel.enable_dbo,
        "context parallelism": parallel.prefill_context_parallel_size > 1
        or parallel.decode_context_parallel_size > 1,
        "data parallelism, where workers read states": bool(judge.layers)
        and parallel.data_parallel_size > 1,
        f"--logprobs-mode {model.logprobs_mode}": model.logprobs_mode
        not in ("raw_logprobs", "raw_logits"),
    }
    reasons = [what for what, present in refused.items() if present]
    if reasons:
        raise SafeguardError(
            f"The guard was not tested with {' nor with '.join(reasons)}; start vLLM without."
        )
    if judge.likeliest is not None and 0 <= model.max_logprobs < judge.likeliest:
        raise SafeguardError(
            f"The guard reads {judge.likeliest} log-probabilities a token, and vLLM gives "
            f"{model.max_logprobs} at most; start it with --max-logprobs {judge.likeliest}."
        )
    _check_workers(config, judge)
    present = {
        "model_type": model.hf_config.model_type,
        "hidden_size": model.hf_text_config.hidden_size,
        "num_layers": model.hf_text_config.num_hidden_layers,
    }
    check_same(present, provenance)


def _check_workers(config: Any, judge: Judge) -> None:
    """Refuse an engine whose workers do not read what the gate needs.

    Raises:
        SafeguardError: how it is made.
    """
    chosen = {
        "worker_cls": config.parallel_config.worker_cls,
        "additional_config": config.additional_config,
        "logits_processors": config.model_config.logits_processors,
        "async_scheduling": config.scheduler_config.async_scheduling,
    }
    for name, value in worker_options(judge).items():
        if chosen[name] != value:
            raise SafeguardError(
                "This guard reads or edits the model's states, and this engine's workers do not do "
                "it for it. Make it with LLM(model, **engine_options(guard)); or let the model's "
                "own refusal decide alone (refusal_alone=True)."
            )
