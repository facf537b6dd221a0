"""A prompt beside its text-only view: which tokens the view keeps, and which it drops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from vlm_safeguard.policy.text_view import TextView

Fate = Literal["kept", "dropped", "added"]


@dataclass(frozen=True)
class Piece:
    """A run of tokens that fare alike.

    Attributes:
        text: as the tokenizer writes them; of equal dropped ones, one.
        tokens: how many.
        fate: `kept`, `dropped`, or `added` where others stood.
    """

    text: str
    tokens: int
    fate: Fate


def pieces(row: Sequence[int], view: TextView, write: Callable[[list[int]], str]) -> list[Piece]:
    """A prompt's tokens in order: kept ones in runs, others each, but equal neighbours as one.

    Args:
        row: token ids of the whole prompt, without padding.
        write: the tokenizer's way from ids to text.

    Raises:
        SafeguardError: the row holds a medium whose text-only view is not known.
    """
    made = []
    for (fate, dropped), group in groupby(_fates(row, view), lambda each: (each[1], each[2])):
        ids = [token for token, _, _ in group]
        made.append(Piece(write(ids if dropped is None else ids[:1]), len(ids), fate))
    return made


def _fates(row: Sequence[int], view: TextView) -> Iterator[tuple[int, Fate, int | None]]:
    """(token, its fate, itself where it is dropped)."""
    position = 0
    for token, origin in zip(*view.aligned(row), strict=True):
        if origin is None:
            yield token, "added", None
            continue
        yield from ((left, "dropped", left) for left in row[position:origin])
        yield token, "kept", None
        position = origin + 1
    yield from ((left, "dropped", left) for left in row[position:])
