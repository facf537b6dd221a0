"""A table as data: cells in lines."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_safeguard.evaluation.results.ratios import CostRatio
from vlm_safeguard.evaluation.results.rows import DEFAULT, SHARES, Row
from vlm_safeguard.report.names import number, percent, times


@dataclass(frozen=True)
class Cell:
    """One cell: its text, small print, what it sorts by, and a share to draw as a bar."""

    text: str
    small: str = ""
    number: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Sheet:
    """One table.

    Attributes:
        name: of its file, without an ending.
        caption: what is shown, in a sentence.
        lines: each as long as the header; the first cell of each names the line.
        folded: whether it is shown only on request.
    """

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    folded: bool = False


EMPTY = Cell("")


def measured(row: Row | CostRatio) -> Cell:
    """A value with its interval; shares in per cent."""
    if isinstance(row, Row) and row.metric in SHARES:
        interval = f"{percent(row.low)}–{percent(row.high)}"
        return Cell(f"{percent(row.value)} %", interval, row.value, row.value)
    if isinstance(row, CostRatio):
        interval = f"{times(row.low)}–{times(row.high)}".replace("×", "")
        return Cell(times(row.value), interval, row.value)
    return Cell(number(row.value), f"{number(row.low)}–{number(row.high)}", row.value)


def is_default(line: tuple[Cell, ...]) -> bool:
    """Whether a line is about the default guard, to be set apart."""
    return line[0].text == DEFAULT
