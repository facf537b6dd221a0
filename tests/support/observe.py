"""A model seen from outside: its answers, the hooks it carries, the tokens it gives away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from vlm_safeguard.model.backbone import Backbone

Model = LlavaForConditionalGeneration


def answer(model: Model, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Eight new tokens, greedily unless told otherwise.

    The logits of every step are those of the head: `generate` rounds its own to float32.
    """
    logits: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: logits.append(out[:, -1]))
    try:
        out = model.generate(
            **inputs,
            **({"max_new_tokens": 8, "do_sample": False} | options),
            return_dict_in_generate=True,
        )
    finally:
        handle.remove()
    out.logits = logits
    return out


@contextmanager
def decoder_passes(model: Model) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of each pass of the decoder while it is open."""
    passes: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(tuple(kwargs["input_ids"].shape))

    handle = Backbone.of(model).decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def step(model: Model, out: Any, mask: Tensor, tokens: int = 1, **options: Any) -> Any:
    """One more forward pass on the cache of `out`, with the likeliest token."""
    ids = out.logits[:, -1:].argmax(-1).expand(-1, tokens)
    longer = torch.cat([mask, torch.ones(len(mask), tokens, dtype=mask.dtype)], dim=1)
    return model(
        input_ids=ids,
        attention_mask=longer,
        position_ids=positions(longer)[:, -tokens:],
        past_key_values=options.pop("past_key_values", out.past_key_values),
        **options,
    )


def hooks(model: Model) -> dict[str, Any]:
    """Every hook of every module, by identity, and the names of everything set on a module."""
    return {
        name: {
            key: [id(hook) for hook in value.values()] if key.endswith("hooks") else None
            for key, value in module.__dict__.items()
            if "hooks" not in key or isinstance(value, dict)
        }
        | {
            key: sorted(value)
            for key, value in module.__dict__.items()
            if key.endswith(("_with_kwargs", "_always_called"))
        }
        for name, module in model.named_modules()
    }


class Watch(BaseStreamer):
    """Counts steps in which a token is chosen, and the tokens that reach a streamer."""

    def __init__(self) -> None:
        self.steps = 0
        self.streamed: list[int] = []
        self._prompt_seen = False

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor: once for every token that is about to be chosen."""
        self.steps += 1
        return scores

    def put(self, value: Tensor) -> None:
        """The prompt first, then every new token."""
        if self._prompt_seen:
            self.streamed += value.flatten().tolist()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is kept back."""
