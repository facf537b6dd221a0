"""Paired tests of the default against each other defence."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_safeguard.evaluation.results.comparisons import Comparison
from vlm_safeguard.report.names import MEASURES, condition_name, judged_by
from vlm_safeguard.report.sheets.sheet import EMPTY, Cell, Sheet


def mcnemar_sheets(comparisons: Sequence[Comparison]) -> list[Sheet]:
    """The default against each other defence on the same prompts, one table a benchmark."""

    def place(test: Comparison) -> tuple[str, str, str]:
        return test.benchmark or "prompts", test.metric, test.judge or ""

    sheets = []
    for at in dict.fromkeys(map(place, comparisons)):
        benchmark, metric, judge = at
        tests = [test for test in comparisons if place(test) == at]
        conditions = list(dict.fromkeys(test.condition for test in tests))
        cells = {(test.a, test.b, test.condition): test for test in tests}
        what = f"{MEASURES.get(metric, metric)}{judged_by(judge)}"
        sheets.append(
            Sheet(
                name="_".join(filter(None, ("mcnemar", metric, benchmark, judge))),
                title=f"{benchmark}: {what}",
                caption="McNemar's exact test on the same prompts. Beside p: prompts where it held "
                "for the first alone and for the second alone.",
                header=("pair", *map(condition_name, conditions)),
                lines=tuple(
                    (
                        Cell(f"{a} against {b}"),
                        *(_test(cells.get((a, b, condition))) for condition in conditions),
                    )
                    for a, b in dict.fromkeys((test.a, test.b) for test in tests)
                ),
                folded=True,
            )
        )
    return sheets


def _test(test: Comparison | None) -> Cell:
    if test is None:
        return EMPTY
    shown = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.3f}"
    return Cell(shown, f"{test.only_a} and {test.only_b} of {test.n}", test.p)
