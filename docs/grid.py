"""Tables of our pages, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A whole table."""
    yield from head(*header)
    yield from (f"| {' | '.join(line)} |" for line in lines)


def head(*titles: str) -> Iterator[str]:
    """A table's head; its lines follow."""
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
