"""A section of the report: a heading, text, figures and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_safeguard.report.sheets.sheet import Sheet


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of its file, without an ending.
        alt: what it shows, for who cannot see it.
        caption: a sentence below it.
        draw: writes it to a PNG file.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Section:
    """One section: a heading, what to know, figures and tables.

    Attributes:
        code: text to be shown as it is, with what it is.
    """

    name: str
    title: str
    intro: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Sheet, ...] = ()
    code: tuple[tuple[str, str], ...] = ()
