"""The first pass of an answer from the text, where the text-only pass has made it already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm_safeguard.model.cache import cache_in


@dataclass(frozen=True, eq=False)
class FirstPass:
    """What a pass over the last token of some prompts would give.

    Attributes:
        cache: keys and values of all their tokens, which those of all but the last give way to.
        logits: (rows, vocabulary) of the answers' first tokens.
    """

    cache: Any
    logits: torch.Tensor

    @contextmanager
    def known_to(self, model: torch.nn.Module) -> Iterator[None]:
        """While open, the model's next pass, which is this one, gives it without running."""
        replaced = model.__dict__.get("forward")  # accelerate's, where it moves weights

        def put_back() -> None:
            if replaced is None:
                model.__dict__.pop("forward", None)
            else:
                model.__dict__["forward"] = replaced

        @wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            put_back()
            given: Any = cache_in(kwargs)
            given.layers = self.cache.layers
            return CausalLMOutputWithPast(logits=self.logits[:, None])

        model.__dict__["forward"] = forward
        try:
            yield
        finally:
            put_back()
