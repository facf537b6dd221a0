"""The text-only view: a request with images as the same request without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextView:
    """How to turn a request with images into the same request without them.

    Attributes:
        placeholder_ids: tokens that stand for an image's patches.
        frame_ids: special tokens that the processor writes between and around patches (row
            breaks, tiles, start and end of an image). A run of these and placeholders is one
            image, if it holds a placeholder.
        glue_ids: ordinary tokens (a line break, a tile's number) that it writes inside an image.
        glue_length: the longest run of them inside an image.
        before: ordinary tokens the chat template puts right before an image, dropped with it.
        number_ids: tokens made of digits, if `before` numbers the image: any number stands there.
        after: tokens it puts right after one, dropped with it.
        instead: tokens that stand there without an image (a line break that the tokenizer fuses
            with those around the image).
        exact: whether the view equals the template's own rendering without the image, token for
            token. False for tokenizers that fuse the image's neighbours with the text.
    """

    placeholder_ids: frozenset[int]
    frame_ids: frozenset[int] = frozenset()
    glue_ids: frozenset[int] = frozenset()
    glue_length: int = 0
    before: tuple[int, ...] = ()
    number_ids: frozenset[int] = frozenset()
    after: tuple[int, ...] = ()
    instead: tuple[int, ...] = ()
    exact: bool = True

    def __call__(self, row: Sequence[int]) -> list[int]:
        """`row` (unpadded token ids) without its images and what wraps them."""
        return self.aligned(row)[0]

    def aligned(self, row: Sequence[int]) -> tuple[list[int], list[int | None]]:
        """The view, and where in `row` each of its tokens stands; None for one put in instead."""
        kept: list[int] = []
        places: list[int | None] = []
        position = 0
        for start, stop in self.images(row):
            kept += row[position:start]
            places += range(position, start)
            wrapper = self._wrapper_start(kept)
            kept[wrapper:] = self.instead
            places[wrapper:] = [None] * len(self.instead)
            position = stop
            if self.after and tuple(row[stop : stop + len(self.after)]) == self.after:
                position += len(self.after)
        kept += row[position:]
        places += range(position, len(row))
        return kept, places

    def first_image(self, row: Sequence[int]) -> int:
        """Where the first image in `row` starts; the row's length where there is none."""
        return next((start for start, _ in self.images(row)), len(row))

    def _wrapper_start(self, kept: Sequence[int]) -> int:
        """Where `before` starts at the end of `kept`, whatever number it has; else its end."""
        start = len(kept)
        for token in reversed(self.before):
            wanted = self.number_ids if token in self.number_ids else {token}
            if not start or kept[start - 1] not in wanted:
                return len(kept)
            start -= 1
            while token in self.number_ids and start and kept[start - 1] in self.number_ids:
                start -= 1
        return start

    def count(self, row: Sequence[int]) -> tuple[int, int]:
        """(images, placeholder tokens) in `row`."""
        spans = list(self.images(row))
        tokens = sum(token in self.placeholder_ids for token in row)
        return len(spans), tokens

    def marks(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every maximal run of placeholders and frame tokens."""
        return _runs(row, self.placeholder_ids | self.frame_ids)

    def images(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every image: marks with nothing but glue between them."""
        current: tuple[int, int] | None = None
        for start, stop in self.marks(row):
            if current is not None:
                gap = row[current[1] : start]
                if len(gap) <= self.glue_length and set(gap) <= self.glue_ids:
                    current = (current[0], stop)
                    continue
                if self.placeholder_ids & set(row[current[0] : current[1]]):
                    yield current
            current = (start, stop)
        if current is not None and self.placeholder_ids & set(row[current[0] : current[1]]):
            yield current


def _runs(row: Sequence[int], ids: frozenset[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of every maximal run of tokens that are in `ids`."""
    start = None
    for position, token in enumerate(row):
        if token in ids:
            start = position if start is None else start
        elif start is not None:
            yield start, position
            start = None
    if start is not None:
        yield start, len(row)
