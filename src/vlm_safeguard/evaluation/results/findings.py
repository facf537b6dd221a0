"""What the rows say: the widest gap, what the guard changes, and what it costs elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.results.comparisons import Comparison
from vlm_safeguard.evaluation.results.measures import (
    Cells,
    accuracy_rows,
    attack_judge,
    attack_rows,
    over_refusal_rows,
)
from vlm_safeguard.evaluation.results.rows import BASELINE, DEFAULT, TEXT, Row

_LEVEL = 0.05  # of all tests together (Bonferroni)


class Contrast(BaseModel):
    """One measure of the same requests under two settings, in the cell that tells most.

    Attributes:
        before: the first setting's row.
        after: the second's.
        highest: the second's highest row in all cells.
        cells: how many were compared, a benchmark under an image condition each.
        lower: of these, where the second is lower.
        higher: of these, where the second is higher.
    """

    model_config = ConfigDict(frozen=True)

    before: Row
    after: Row
    highest: Row
    cells: int
    lower: int
    higher: int

    @property
    def change(self) -> float:
        """The second share less the first."""
        return self.after.value - self.before.value


class Tests(BaseModel):
    """Paired tests of the default guard against none.

    Attributes:
        clear: tests whose p is below 0.05 divided by their number.
    """

    model_config = ConfigDict(frozen=True)

    tests: int
    clear: int


class Findings(BaseModel):
    """The few numbers that tell most; None where they were not measured.

    Attributes:
        attack_judge: whose word attack success is.
        gap: attack success without a guard, as text alone and then with an image; the widest.
        gap_guarded: the default guard's row where the gap is widest.
        attack: attack success without a guard and then with the default; the largest fall.
        tests: of the cells in `attack`.
        over_refusal: harmless requests refused, without and then with it; the largest rise.
        utility: questions answered right, without and then with it; the largest change.
    """

    model_config = ConfigDict(frozen=True)

    attack_judge: str
    gap: Contrast | None
    gap_guarded: Row | None
    attack: Contrast | None
    tests: Tests | None
    over_refusal: Contrast | None
    utility: Contrast | None


def findings(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> Findings:
    """Read them off the rows and paired tests of an evaluation."""
    attack, over_refusal, utility = (
        Cells(attack_rows(rows)),
        Cells(over_refusal_rows(rows)),
        Cells(accuracy_rows(rows)),
    )
    gap = _contrast(image_pairs(attack), lambda change: change)
    return Findings(
        attack_judge=attack_judge(rows),
        gap=gap,
        gap_guarded=None if gap is None else attack.default(gap.after),
        attack=_contrast(attack.guarded(), lambda change: -change),
        tests=_tests(attack.guarded(), comparisons),
        over_refusal=_contrast(over_refusal.guarded(), lambda change: change),
        utility=_contrast(utility.guarded(), abs),
    )


def image_pairs(attack: Cells) -> list[tuple[Row, Row]]:
    """(as text alone, with an image) of every unguarded cell with an image."""
    return [
        (text, cell[BASELINE])
        for (_, condition), cell in attack.by_defence.items()
        if condition != TEXT and BASELINE in cell and (text := attack.text(cell[BASELINE]))
    ]


def _contrast(
    pairs: Sequence[tuple[Row, Row]], weight: Callable[[float], float]
) -> Contrast | None:
    """The pair whose change weighs most, and how many change which way."""
    if not pairs:
        return None
    before, after = max(pairs, key=lambda pair: weight(pair[1].value - pair[0].value))
    return Contrast(
        before=before,
        after=after,
        highest=max((second for _, second in pairs), key=lambda row: row.value),
        cells=len(pairs),
        lower=sum(second.value < first.value for first, second in pairs),
        higher=sum(second.value > first.value for first, second in pairs),
    )


def _tests(pairs: Sequence[tuple[Row, Row]], comparisons: Sequence[Comparison]) -> Tests | None:
    cells = {(row.benchmark, row.condition, row.judge) for _, row in pairs}
    tests = [
        test
        for test in comparisons
        if {test.a, test.b} == {BASELINE, DEFAULT}
        and test.metric in ("attack_success", "refusal")
        and (test.benchmark, test.condition, test.judge) in cells
    ]
    if not tests:
        return None
    return Tests(tests=len(tests), clear=sum(test.p < _LEVEL / len(tests) for test in tests))
