"""Which rows a measure is read from: those of one judge, by cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from vlm_safeguard.evaluation.results.rows import BASELINE, DEFAULT, TEXT, Metric, Row

R = TypeVar("R", bound=Row)
PHRASES = "refusal"  # the judge that only looks for phrases of refusal


def chief_judge(rows: Sequence[Row], metric: Metric) -> str | None:
    """The judge that is quoted for a measure: who judged most cells, or was named first."""
    judged = Counter(row.judge for row in rows if row.metric == metric and row.judge is not None)
    return judged.most_common(1)[0][0] if judged else None


def attack_rows(rows: Sequence[R]) -> list[R]:
    """Attack success by its chief judge.

    Where no judge of harm was asked, a harmful request that was not refused counts as a success.
    """
    judge = chief_judge(rows, "attack_success")
    attacks = [row for row in rows if row.metric == "attack_success" and row.judge == judge]
    if attacks:
        return attacks
    judge = chief_judge(rows, "refusal")
    return [
        row.model_copy(
            update={
                "metric": "attack_success",
                "value": 1 - row.value,
                "low": 1 - row.high,
                "high": 1 - row.low,
            }
        )
        for row in rows
        if row.metric == "refusal" and row.prompts == "harmful" and row.judge == judge
    ]


def attack_judge(rows: Sequence[Row]) -> str:
    """Who judged the rows of `attack_rows`; the demo's replies were read for phrases."""
    return next((row.judge for row in attack_rows(rows) if row.judge is not None), PHRASES)


def over_refusal_rows(rows: Sequence[Row]) -> list[Row]:
    """Over-refusal: harmless requests that the chief judge says were refused."""
    harmless = [row for row in rows if row.metric == "refusal" and row.prompts == "harmless"]
    judge = chief_judge(harmless, "refusal")
    return [row for row in harmless if row.judge == judge]


def accuracy_rows(rows: Sequence[Row]) -> list[Row]:
    """Utility: questions answered right."""
    return [row for row in rows if row.metric == "accuracy"]


def quotes_phrases(rows: Sequence[Row]) -> bool:
    """Whether the judge `refusal` counted a share that is quoted, as it does all of the demo's."""
    quoted = (*attack_rows(rows), *over_refusal_rows(rows))
    return any(row.judge in (None, PHRASES) for row in quoted)


class Cells:
    """The rows of one measure by (benchmark, condition), then by defence."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.by_defence: dict[tuple[str | None, str], dict[str, Row]] = {}
        for row in rows:
            cell = self.by_defence.setdefault((row.benchmark, row.condition), {})
            cell[row.defence] = row

    def guarded(self) -> list[tuple[Row, Row]]:
        """(unguarded, default) of every cell that has both."""
        return [
            (cell[BASELINE], cell[DEFAULT])
            for cell in self.by_defence.values()
            if BASELINE in cell and DEFAULT in cell
        ]

    def text(self, row: Row) -> Row | None:
        """The unguarded row of a row's benchmark, asked as text alone."""
        return self.by_defence.get((row.benchmark, TEXT), {}).get(BASELINE)

    def default(self, row: Row) -> Row | None:
        """The default guard's row in a row's cell."""
        return self.by_defence.get((row.benchmark, row.condition), {}).get(DEFAULT)
