"""The text-only view: a request with images as the same request without them.

What a picture becomes in a prompt is learnt from the model's processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from vlm_safeguard.conversation import encode_chat, tokenizer_of
from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_PROBES = ("What is shown here?", "Describe it in one word.")
#: Pictures to show: how many, and their width and height; large ones may be cut into tiles.
_PICTURES = ((1, (64, 64)), (1, (300, 100)), (1, (500, 700)), (2, (64, 64)), (3, (64, 64)))


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

    @classmethod
    def learn(cls, processor: ProcessorMixin, placeholder_ids: frozenset[int]) -> TextView:
        """Read off what an image becomes in a prompt, by asking questions with and without one.

        Raises:
            SafeguardError: the template puts no image token into a conversation with an image.
        """
        shown = [
            (
                count,
                encode_chat(processor, question),
                encode_chat(processor, question, images=count, size=size),
            )
            for question in _PROBES
            for count, size in _PICTURES
        ]
        if not all(placeholder_ids & set(ids) for _, _, ids in shown):
            raise SafeguardError(
                "The processor's chat template puts no image token into a conversation that "
                f"has an image (looked for ids {sorted(placeholder_ids)}): processor and "
                "model do not belong together."
            )
        special = _special_ids(processor).difference(*(plain for _, plain, _ in shown))
        chunks = []
        for count, plain, ids in shown:
            prefix = _common(plain, ids, limit=len(plain))
            suffix = _common(plain[::-1], ids[::-1], limit=len(plain) - prefix)
            chunks.append((count, ids[prefix : len(ids) - suffix]))
        frame = special.intersection(token for _, chunk in chunks for token in chunk)
        view = cls(placeholder_ids, frame - placeholder_ids)
        # what stands inside one image; if that does not explain several (numbered ones), in all
        for most in (1, max(count for count, _ in chunks)):
            gaps = [
                chunk[stop:start]
                for count, chunk in chunks
                if count <= most
                for (_, stop), (start, _) in pairwise(view._marks(chunk))
            ]
            view = replace(
                view,
                glue_ids=frozenset(token for gap in gaps for token in gap),
                glue_length=max(map(len, gaps), default=0),
            )
            singles = [(plain, ids) for count, plain, ids in shown if count == 1]
            view = view._with_wrapper([singles[0], singles[-1]])
            numbers = _number_ids(processor)
            view = replace(view, number_ids=numbers if numbers & set(view.before) else frozenset())
            view = replace(view, exact=all(view(ids) == plain for _, plain, ids in shown))
            if view.exact:
                break
        return view

    def _with_wrapper(self, shown: Sequence[tuple[list[int], list[int]]]) -> TextView:
        """This view, with the ordinary tokens around one image as two different questions show it.

        Where the tokenizer fuses text with its neighbours, the wrapper is what both share.
        """
        befores, afters, insteads = [], [], []
        for plain, ids in shown:
            images = list(self._images(ids))
            start, stop = images[0][0], images[-1][1]
            prefix = _common(ids, plain, limit=min(start, len(plain)))
            room = min(len(ids) - stop, len(plain) - prefix)
            suffix = _common(ids[::-1], plain[::-1], limit=room)
            befores.append(ids[prefix:start])
            afters.append(ids[stop : len(ids) - suffix])
            insteads.append(plain[prefix : len(plain) - suffix])
        before = _common(befores[0][::-1], befores[1][::-1], limit=min(map(len, befores)))
        after = _common(*afters, limit=min(map(len, afters)))
        return replace(
            self,
            before=tuple(befores[0][len(befores[0]) - before :]),
            after=tuple(afters[0][:after]),
            instead=tuple(insteads[0]) if insteads[0] == insteads[1] else (),
        )

    def __call__(self, row: Sequence[int]) -> list[int]:
        """`row` (unpadded token ids) without its images and what wraps them."""
        return self.aligned(row)[0]

    def aligned(self, row: Sequence[int]) -> tuple[list[int], list[int | None]]:
        """The view, and where in `row` each of its tokens stands; None for one put in instead."""
        kept: list[int] = []
        places: list[int | None] = []
        position = 0
        for start, stop in self._images(row):
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
        return next((start for start, _ in self._images(row)), len(row))

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
        spans = list(self._images(row))
        tokens = sum(token in self.placeholder_ids for token in row)
        return len(spans), tokens

    def _marks(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every maximal run of placeholders and frame tokens."""
        return _runs(row, self.placeholder_ids | self.frame_ids)

    def _images(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every image: marks with nothing but glue between them."""
        current: tuple[int, int] | None = None
        for start, stop in self._marks(row):
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


def _special_ids(processor: ProcessorMixin) -> frozenset[int]:
    """Tokens that stand for more than their text: special and added ones."""
    tokenizer = tokenizer_of(processor)
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def _number_ids(processor: ProcessorMixin) -> frozenset[int]:
    """Tokens that write digits and nothing else."""
    vocabulary = tokenizer_of(processor).get_vocab()
    return frozenset(
        index for token, index in vocabulary.items() if token.strip("\u0120\u2581 ").isdigit()
    )


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


def _common(left: Sequence[int], right: Sequence[int], *, limit: int) -> int:
    """Length of the common start of two sequences, at most `limit`."""
    length = 0
    while length < limit and left[length] == right[length]:
        length += 1
    return length
