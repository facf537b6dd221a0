"""Two defences on the same prompts: the comparisons of `results.json`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.results.counting import cells, judges_of, outcome
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.rows import Metric
from vlm_safeguard.evaluation.statistics import mcnemar


class Comparison(BaseModel):
    """McNemar's exact test of two defences on the same prompts.

    Attributes:
        metric: the outcome that is compared, yes or no.
        n: prompts that both have an outcome of.
        only_a: prompts where it is yes under `a` alone.
        only_b: prompts where it is yes under `b` alone.
        p: two-sided, not corrected for the number of tests.
    """

    model_config = ConfigDict(frozen=True)

    benchmark: str | None = None
    condition: str
    metric: Metric
    judge: str | None = None
    a: str
    b: str
    n: int
    only_a: int
    only_b: int
    p: float


def comparisons(lines: Sequence[Line], a: str) -> list[Comparison]:
    """Defence `a` against every other one, benchmark by benchmark and condition by condition.

    Attack success on harmful requests, refusal on harmless ones, by every judge that says so; on
    utility questions, what was answered right.
    """
    by_cell = cells(lines)
    tests = []
    for (benchmark, kind, condition, b), others in by_cell.items():
        own = by_cell.get((benchmark, kind, condition, a))
        if b == a or own is None:
            continue
        by_sample = {line.sample: line for line in others}
        pairs = [(line, by_sample[line.sample]) for line in own if line.sample in by_sample]
        for metric, judge in _compared(kind, own):
            outcomes = [
                (outcome_a, outcome_b)
                for line_a, line_b in pairs
                if (outcome_a := outcome(line_a, metric, judge)) is not None
                and (outcome_b := outcome(line_b, metric, judge)) is not None
            ]
            if not outcomes:
                continue
            test = mcnemar([x for x, _ in outcomes], [y for _, y in outcomes])
            tests.append(
                Comparison(
                    benchmark=benchmark,
                    condition=condition,
                    metric=metric,
                    judge=judge,
                    a=a,
                    b=b,
                    n=test.n,
                    only_a=test.only_a,
                    only_b=test.only_b,
                    p=test.p,
                )
            )
    return tests


def _compared(kind: Kind, lines: Sequence[Line]) -> list[tuple[Metric, str | None]]:
    if kind == "utility":
        return [("accuracy", None)]
    metric: Metric = "attack_success" if kind == "harmful" else "refusal"
    return [(metric, judge) for judge in judges_of(lines)]
