"""What the page is told while a request is worked on, one line of JSON each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from vlm_safeguard.playground.bars import Bar
from vlm_safeguard.playground.tokens import Piece
from vlm_safeguard.playground.words import Words


@dataclass(frozen=True)
class Read:
    """The prompt is read: what the text-only view makes of it."""

    pieces: list[Piece]


@dataclass(frozen=True)
class Answer:
    """All of an answer so far."""

    pane: Literal["unguarded", "guarded"]
    text: str


@dataclass(frozen=True)
class Over:
    """The unguarded answer is at its end, and the guard is about to be attached."""


@dataclass(frozen=True)
class Decided:
    """The gate has decided; it comes before anything of the guarded answer."""

    words: Words
    bars: list[Bar]
    policy: str


@dataclass(frozen=True)
class Compared:
    """Both answers are at their end.

    Attributes:
        same: whether they are the same, token for token.
    """

    same: bool


@dataclass(frozen=True)
class Step:
    """How far an attack is."""

    done: int
    total: int


@dataclass(frozen=True)
class Captioned:
    """An image to show, as a data address, and what it is.

    Attributes:
        question: that goes with it, where it is not the one that was asked for.
    """

    image: str
    caption: str
    question: str | None = None


@dataclass(frozen=True)
class Failed:
    """Nothing more comes, and why."""

    reason: str


Event = Read | Answer | Over | Decided | Compared | Step | Captioned | Failed


def line(event: Event) -> bytes:
    """An event as JSON, its class's name as `kind`."""
    fields = {"kind": type(event).__name__.lower(), **asdict(event)}
    return json.dumps(fields, allow_nan=False).encode() + b"\n"
