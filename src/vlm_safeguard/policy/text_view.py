"""The text-only view: a request with media as the same request without them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.media import KINDS, Clip, Kind, Media


class Medium(NamedTuple):
    """One medium in a row.

    Attributes:
        kinds: what it counts as.
        start: where it starts.
        stop: where it ends.
        cut: what is taken out of the row with it: it and the template's tokens around it.
        instead: tokens that stand there without it.
    """

    kinds: tuple[Kind, ...]
    start: int
    stop: int
    cut: tuple[int, int]
    instead: tuple[int, ...]


@dataclass(frozen=True)
class TextView:
    """How to turn a request with images, videos or audio into the same request without them.

    What one image becomes varies with its size, so images are runs of tokens; videos and audio
    are patterns (`clips`). A row is read by its tokens alone: where a family writes nothing of its
    own around a video but times or numbers, the same typed right before an image reads as a video.

    Attributes:
        placeholder_ids: tokens that stand for the patches of images and videos, or for audio.
        frame_ids: special tokens that the processor writes between and around an image's patches
            (row breaks, tiles, start and end). A run of these and placeholders is one image, if it
            holds a placeholder.
        glue_ids: ordinary tokens (a line break, a tile's number) that it writes inside an image.
        glue_length: the longest run of them inside an image, a number counted as one.
        before: ordinary tokens the chat template puts right before an image, dropped with it.
        number_ids: tokens made of digits, if `before`, a clip or an image's inside holds a number:
            any number stands there.
        after: tokens it puts right after an image, dropped with it.
        instead: tokens that stand there without an image (a line break that the tokenizer fuses
            with those around the image).
        exact: whether the view equals the template's own rendering without the image, token for
            token. False for tokenizers that fuse the image's neighbours with the text.
        image_ids: the placeholders that images take; None in a guard that was fitted before videos
            and audio were told from images.
        counted: a token and how often every image has it, whatever its size, by which images
            without text between them are told apart; None where there is none.
        clips: what videos and audio become; one is sought in what those before it left of a row.
        labels: tokens that the template puts right before a medium only if asked to number them, a
            number among them ("Picture 1: "); dropped with it, also where they were typed.
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
    image_ids: frozenset[int] | None = None
    counted: tuple[int, int] | None = None
    clips: tuple[Clip, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()

    def __call__(self, row: Sequence[int]) -> list[int]:
        """`row` (unpadded token ids) without its media and what wraps them.

        Raises:
            SafeguardError: the row holds a medium whose text-only view is not known.
        """
        return self.aligned(row)[0]

    def aligned(self, row: Sequence[int]) -> tuple[list[int], list[int | None]]:
        """The view, and where in `row` each of its tokens stands; None for one put in instead.

        Raises:
            SafeguardError: the row holds a medium whose text-only view is not known.
        """
        kept: list[int] = []
        places: list[int | None] = []
        position = 0
        for medium in self.located(row):
            start, stop = medium.cut
            kept += [*row[position:start], *medium.instead]
            places += [*range(position, start), *[None] * len(medium.instead)]
            position = stop
        return [*kept, *row[position:]], [*places, *range(position, len(row))]

    def first_medium(self, row: Sequence[int]) -> int:
        """Where the first image, video or audio in `row` starts; else the row's length."""
        return next((medium.start for medium in self.located(row)), len(row))

    def media(self, row: Sequence[int]) -> Media:
        """What `row` holds beside its text.

        Images without text between them are counted by `counted`; without it, as one. Videos are
        counted by their pattern, so two of a family that writes nothing around them may be one.

        Raises:
            SafeguardError: the row holds a medium whose text-only view is not known.
        """
        located = self.located(row)
        numbers = {
            kind: sum(
                self._images_in(row[medium.start : medium.stop]) if kind == "image" else 1
                for medium in located
                if kind in medium.kinds
            )
            for kind in KINDS
        }
        tokens = sum(token in self.placeholder_ids for token in row)
        return Media(numbers["image"], numbers["video"], numbers["audio"], tokens)

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of media whose text-only view is known."""
        known = [clip.kinds for clip in self.clips if clip.known]
        return frozenset(k for k in KINDS if k == "image" or any(k in kinds for kinds in known))

    def located(self, row: Sequence[int]) -> list[Medium]:
        """Every medium in `row`, in order.

        Raises:
            SafeguardError: the row holds a medium whose text-only view is not known.
        """
        if self.image_ids is None and len(self.placeholder_ids) > 1:
            if not self.placeholder_ids.isdisjoint(row):
                raise SafeguardError(
                    "This guard was fitted before images, videos and audio were told apart; fit "
                    "it again for this model. Nothing was generated."
                )
            return []
        located: list[Medium] = []
        position = 0
        for medium in [*self._clips_of(row), None]:
            stop = len(row) if medium is None else medium.start
            located += self._images_of(row[position:stop], position)
            if medium is not None:
                located.append(medium)
                position = medium.stop
        return self._labelled(row, located) if self.labels else located

    def marks(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every maximal run of an image's placeholders and frame tokens."""
        return _runs(row, self._image_ids | self.frame_ids)

    def images(self, row: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) of every image: marks with nothing but glue between them."""
        current: tuple[int, int] | None = None
        for start, stop in self.marks(row):
            if current is not None:
                if self._glued(row[current[1] : start]):
                    current = (current[0], stop)
                    continue
                if self._image_ids & set(row[current[0] : current[1]]):
                    yield current
            current = (start, stop)
        if current is not None and self._image_ids & set(row[current[0] : current[1]]):
            yield current

    def _glued(self, gap: Sequence[int]) -> bool:
        """Whether these tokens between two marks are an image's own, whatever numbers they have."""
        numbers = self.number_ids if self.number_ids & self.glue_ids else frozenset()
        short = one_a_number(gap, numbers)
        return len(short) <= self.glue_length and set(short) <= self.glue_ids | numbers

    @property
    def _image_ids(self) -> frozenset[int]:
        return self.placeholder_ids if self.image_ids is None else self.image_ids

    def _images_of(self, row: Sequence[int], offset: int) -> Iterator[Medium]:
        """The images of a stretch without clips that starts at `offset`."""
        position = 0
        for start, stop in self.images(row):
            cut = stop
            if self.after and tuple(row[stop : stop + len(self.after)]) == self.after:
                cut += len(self.after)
            before = position + self._start_of(self.before, row[position:start])
            yield Medium(
                ("image",),
                offset + start,
                offset + stop,
                (offset + before, offset + cut),
                self.instead,
            )
            position = cut

    def _labelled(self, row: Sequence[int], located: Sequence[Medium]) -> list[Medium]:
        """The media of a row, each cut out with the label before it."""
        media: list[Medium] = []
        position = 0
        for medium in located:
            start, stop = medium.cut
            text = row[position:start]
            starts = [position + self._start_of(label, text) for label in self.labels]
            media.append(medium._replace(cut=(min(starts), stop)))
            position = stop
        return media

    def _start_of(self, wrapper: Sequence[int], kept: Sequence[int]) -> int:
        """Where `wrapper` starts at the end of `kept`, whatever number it has; else its end."""
        start = len(kept)
        for token in reversed(wrapper):
            wanted = self.number_ids if token in self.number_ids else {token}
            if not start or kept[start - 1] not in wanted:
                return len(kept)
            start -= 1
            while token in self.number_ids and start and kept[start - 1] in self.number_ids:
                start -= 1
        return start

    def _clips_of(self, row: Sequence[int]) -> list[Medium]:
        """The videos and audio of a row, in order; a clip is sought in what the ones before left.

        Raises:
            SafeguardError: one is of an unknown form, or a placeholder of theirs stands alone.
        """
        located: list[Medium] = []
        rest = "".join(map(chr, row)) if self.clips else ""
        for clip, expression in zip(self.clips, self._expressions, strict=True):
            for match in expression.finditer(rest):
                if not clip.known:
                    raise SafeguardError(
                        f"A request holds {_NAMES[clip.kinds[0]]} that this guard cannot take out "
                        "of its text as the chat template would, so it cannot be judged and "
                        "nothing was generated. Leave it out, put it at the start of its turn, or "
                        "fit a guard with the processor that wrote it."
                    )
                located.append(Medium(clip.kinds, *match.span(), match.span(), clip.instead))
            rest = expression.sub(lambda match: _TAKEN * len(match[0]), rest)
        return sorted(located, key=lambda medium: medium.start)

    @cached_property
    def _expressions(self) -> list[re.Pattern[str]]:
        """The clips' patterns, over rows whose tokens are written as one character each."""
        return [re.compile(clip.expression(self.number_ids)) for clip in self.clips]

    def _images_in(self, tokens: Sequence[int]) -> int:
        """How many images a run of an image's tokens is."""
        if self.counted is None:
            return 1
        token, times = self.counted
        return max(1, -(-list(tokens).count(token) // times))


#: Stands for tokens that a clip was found in; no vocabulary is that large.
_TAKEN = chr(0x10FFFF)
_NAMES: dict[Kind, str] = {"image": "an image", "video": "a video", "audio": "audio"}


def one_a_number(tokens: Sequence[int], number_ids: frozenset[int]) -> list[int]:
    """`tokens` with the first one of each number only."""
    return [
        token
        for place, token in enumerate(tokens)
        if not (token in number_ids and place and tokens[place - 1] in number_ids)
    ]


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
