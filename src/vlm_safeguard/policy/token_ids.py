"""Sequences of token ids, compared."""

from __future__ import annotations

from collections.abc import Sequence


def same_start(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common start of two sequences: where they first differ, or the shorter ends."""
    shortest = min(len(left), len(right))
    return next((i for i in range(shortest) if left[i] != right[i]), shortest)


def shared_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The common start of sequences, of which there is one at least."""
    first = rows[0]
    return list(first[: min(same_start(first, row) for row in rows)])


def last_place(text: Sequence[int], ids: tuple[int, ...]) -> int | None:
    """Where `ids`, of which there is one at least, stand in a text for the last time."""
    for start in reversed(range(len(text) - len(ids) + 1)):
        if text[start] == ids[0] and tuple(text[start : start + len(ids)]) == ids:
            return start
    return None
