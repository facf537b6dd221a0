"""The canary: one pass that proves that what an engine does to each layer acts on the output.

All rows of the pass are alike; row 2 + i is pushed at the i-th watched layer only, so each row that
differs from row 0 proves one layer. Rows 0 and 1 tell how much equal rows differ anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_NOISE = 100  # a push's effect must be this many times what equal rows differ by


def canary_rows(watched: Sequence[int]) -> int:
    """How many rows the pass has."""
    return 2 + len(watched)


def pushed(hidden: torch.Tensor, place: int, direction: torch.Tensor) -> torch.Tensor:
    """The states after the `place`-th watched layer, with that layer's row pushed.

    Args:
        hidden: (rows, tokens, hidden) states.
        direction: (hidden,) of unit length, that the row is pushed along by its own norm.
    """
    out = hidden.clone()
    row = hidden[2 + place]
    out[2 + place] += direction.to(hidden.dtype) * row.norm(dim=-1, keepdim=True)
    return out


def silent_layers(logits: torch.Tensor, watched: Sequence[int]) -> list[int]:
    """The layers whose push did not reach the output; all of them where it is not finite.

    Args:
        logits: (rows, vocabulary) of the pass's last token.
    """
    effect = (logits - logits[0]).float().abs().amax(-1)
    if not torch.isfinite(effect).all():
        return list(watched)
    noise = effect[1] * _NOISE + torch.finfo(logits.dtype).tiny
    return [layer for layer, moved in zip(watched, effect[2:] > noise, strict=True) if not moved]
