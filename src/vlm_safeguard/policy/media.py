"""What a request shows beside its text: how much of it, and what a video or an audio looks like."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["image", "video", "audio"]
KINDS: tuple[Kind, ...] = ("image", "video", "audio")


@dataclass(frozen=True)
class Media:
    """How many media of each kind a request holds, and how many placeholder tokens they take.

    A video whose sound is read with it counts as a video and as an audio.
    """

    images: int = 0
    videos: int = 0
    audios: int = 0
    tokens: int = 0

    @property
    def total(self) -> int:
        """Media of every kind."""
        return self.images + self.videos + self.audios

    @property
    def in_words(self) -> str:
        """All of them, counted: "2 images, 1 audio"; empty where there are none."""
        counts = zip(KINDS, (self.images, self.videos, self.audios), strict=True)
        return ", ".join(counted(n, kind) for kind, n in counts if n)


def counted(count: int, noun: str) -> str:
    """A number of what it counts: "1 image", "2 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Clip:
    """What a video or an audio becomes in a prompt, as a pattern of token ids.

    The pattern is `head`, any number of `unit`s, then `tail`. In it, a token of `pad_ids` stands
    for any run of these, and one of the view's `number_ids` for any number: a timestamp, say.

    Attributes:
        kinds: what it counts as; a video with its sound is both.
        pad_ids: tokens that stand for its patches or sounds, and the breaks between them.
        head: tokens up to where units repeat, the template's own around it among them.
        unit: tokens of each further frame or group of frames; empty where none repeat.
        tail: tokens behind them.
        instead: tokens that stand there without it (a line break that the tokenizer fuses).
        known: whether its text-only view is known. Requests that hold an unknown one are refused.
    """

    kinds: tuple[Kind, ...]
    pad_ids: frozenset[int]
    head: tuple[int, ...]
    unit: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    instead: tuple[int, ...] = ()
    known: bool = True

    def expression(self, number_ids: frozenset[int]) -> str:
        """The pattern as a regular expression over tokens as characters."""

        def written(tokens: tuple[int, ...]) -> str:
            return "".join(
                _any_of(self.pad_ids)
                if token in self.pad_ids
                else _any_of(number_ids)
                if token in number_ids
                else re.escape(chr(token))
                for token in tokens
            )

        repeated = f"(?:{written(self.unit)})*" if self.unit else ""
        return written(self.head) + repeated + written(self.tail)


def _any_of(ids: frozenset[int]) -> str:
    """A run of one or more of these tokens."""
    return f"[{''.join(re.escape(chr(token)) for token in sorted(ids))}]+"
