"""A request's question: what the engine is asked about its text, and what its answer decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.request import Request

_READ = ("length", "stop")  # how a request for one token ends that the engine has read


class NotReadError(RuntimeError):
    """A question ended without being read, so the request's gate is neither open nor closed."""


def read(judge: Judge, prompt: Any) -> Request:
    """A prompt as vLLM's renderer gives it.

    Raises:
        ValueError: it is not rendered, is made of embeddings or has an encoder's part; or it cannot
            be judged.
    """
    kind = prompt.get("type") if isinstance(prompt, dict) else None
    if kind not in ("token", "multimodal") or "encoder_prompt_token_ids" in prompt:
        raise ValueError(
            "the guard reads prompts of tokens and media; embeddings, encoders' prompts and inputs "
            "that come as a stream are refused"
        )
    placed = prompt.get("mm_placeholders") or {}
    ranges = [(r.offset, r.offset + r.length) for each in placed.values() for r in each]
    try:
        return judge.read(prompt["prompt_token_ids"], ranges)
    except SafeguardError as error:
        raise ValueError(str(error)) from error


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse a request for an adapter.

    Raises:
        ValueError: it is one.
    """
    if options.get("lora_request") is not None:
        raise ValueError("the guard was fitted without adapters; requests for one fail")


def tokens(ids: list[int], prompt: Any) -> dict[str, Any]:
    """A rendered prompt of tokens alone; what salts the prefix cache for `prompt` does for it.

    No salt of ours is needed: whatever is decided, all keys are those of an unmodified model.
    """
    salt = {name: prompt[name] for name in ("cache_salt",) if name in prompt}
    return {"type": "token", "prompt_token_ids": ids, **salt}


def params(judge: Judge) -> Any:
    """How a question is read: the log-probabilities of its tokens, and the likeliest instead."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=judge.likeliest, detokenize=False
    )


def receipt_of(judge: Judge, request: Request, output: Any) -> Receipt:
    """What the engine's answer to a request's question decides.

    Args:
        output: the last one that the engine gave; None where it gave nothing.

    Raises:
        NotReadError: it gave nothing, or stopped before it was read.
    """
    reasons = [each.finish_reason for each in output.outputs] if output is not None else []
    if len(reasons) != 1 or reasons[0] not in _READ or output.prompt_logprobs is None:
        raise NotReadError(
            f"The engine did not read a request's text (it ended by {reasons or 'nothing'}), so "
            "its gate is neither open nor closed, and nothing is answered."
        )
    try:
        return judge.receipt(request, output.prompt_logprobs)
    except (ValueError, SafeguardError) as error:
        raise NotReadError(f"The engine did not read a request's text: {error}.") from error
