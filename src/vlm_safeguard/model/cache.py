"""The cache among what a pass takes or gives: transformers 5.24 renamed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Cache

#: What transformers calls it, from 5.24 on and before. Where both are given, it takes the first.
CACHE_NAMES = ("cache", "past_key_values")


def cache_in(values: object) -> Cache | None:
    """The cache among named inputs, options or outputs; None where there is none.

    Args:
        values: a mapping; the tuple that a model may be told to give names nothing.
    """
    if not isinstance(values, Mapping):
        return None
    cache: Cache | None = next((values[name] for name in CACHE_NAMES if name in values), None)
    return cache
