"""Names and what they stand for: defences, versions, the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.report.names import defence_words
from vlm_safeguard.report.sheets.sheet import Cell, Sheet


def glossary_sheet(rows: Sequence[Row]) -> Sheet:
    """What each defence's name stands for."""
    return Sheet(
        name="defences",
        title="Defences",
        caption="The defences that were compared.",
        header=("name", "what it is"),
        lines=tuple(
            (Cell(name), Cell(defence_words(name) or "not one of this package's own"))
            for name in dict.fromkeys(row.defence for row in rows)
        ),
    )


def facts_sheet(name: str, title: str, caption: str, facts: Mapping[str, object]) -> Sheet:
    """Names and values."""
    return Sheet(
        name=name,
        title=title,
        caption=caption,
        header=("what", "value"),
        lines=tuple((Cell(key), Cell(str(value))) for key, value in facts.items()),
    )
