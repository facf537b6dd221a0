"""A text-only pass that answers go on from, so that the texts are not read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

#: Layers of a cache that hold one state a token; others mix tokens and cannot always be gone on in.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, eq=False)
class TextPass:
    """What a model's decoder made of texts, left-padded to one width.

    Attributes:
        rows: each text's row.
        final: (rows, hidden) final states of the last tokens.
        mask: (rows, width), 1 where a token stands.
        cache: keys and values of all tokens; None where the decoder's cannot be gone on in.
        head: (rows, hidden) final states → (rows, vocabulary) float32 logits.
    """

    rows: dict[tuple[int, ...], int]
    final: torch.Tensor
    mask: torch.Tensor
    cache: Cache | None
    head: Callable[[torch.Tensor], torch.Tensor]

    @cached_property
    def logits(self) -> torch.Tensor:
        """(rows, vocabulary) float32 of the tokens that come next."""
        return self.head(self.final)

    def holds(self, texts: Sequence[tuple[int, ...]]) -> bool:
        """Whether all of these can be gone on in."""
        return self.cache is not None and all(text in self.rows for text in texts)

    def reaches(self, length: int) -> bool:
        """Whether so many tokens can be gone on in, none of them out of a sliding window."""
        layers = () if self.cache is None else self.cache.layers
        return bool(layers) and all(
            not layer.is_sliding or length <= layer.sliding_window for layer in layers
        )

    def cache_of(self, texts: Sequence[tuple[int, ...]]) -> Any:
        """A cache of these texts' own, in this order; None where there can be none."""
        if not self.holds(texts):
            return None
        cache = copied(self.cache)
        cache.batch_select_indices(self.places(texts))
        return cache

    def places(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """(texts,) their rows."""
        return torch.tensor([self.rows[text] for text in texts], device=self.mask.device)


def plain_cache(cache: Any) -> Cache | None:
    """A cache that can be gone on in; None where it is of another kind."""
    layers = getattr(cache, "layers", ())
    return cache if layers and all(type(layer) in _PLAIN for layer in layers) else None


def padding_first(cache: Any, mask: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A cache with (rows, width) `mask`, and that mask, with all padding before the first token.

    Keys know their positions, so that they may lie anywhere.
    """
    order = mask.argsort(dim=1, stable=True)
    moved = copied(cache)
    for layer in filter(attrgetter("is_initialized"), moved.layers):  # not those for images alone
        for name in ("keys", "values"):
            held = getattr(layer, name)
            index = order.to(held.device)[:, None, :, None].expand_as(held)
            setattr(layer, name, held.gather(2, index))
    return moved, mask.gather(1, order)


def without_last(cache: Any) -> Any:
    """The same without the texts' last tokens; None where they cannot be taken back."""
    if any(_is_full(layer) for layer in cache.layers):
        return None
    shorter = copied(cache)
    shorter.crop(-1)
    return shorter


def copied(cache: Any) -> Any:
    """One whose layers change by themselves; it shares what they hold."""
    other = copy(cache)
    other.layers = [copy(layer) for layer in cache.layers]
    return other


def _is_full(layer: Any) -> bool:
    """Whether a sliding window has dropped tokens, so that none can be taken back."""
    return bool(layer.is_sliding) and layer.get_seq_length() >= layer.sliding_window
