"""Tables as data, arranged once for HTML, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_safeguard.evaluation.judges.agreement import Agreement
from vlm_safeguard.evaluation.results.rows import SHARES, Results, Row
from vlm_safeguard.report.names import (
    DEFAULT,
    MEASURES,
    QUESTIONS,
    condition_name,
    defence_words,
    judge_name,
    judged_by,
    number,
    percent,
    times,
)
from vlm_safeguard.report.published import published_for
from vlm_safeguard.report.ratios import RATIOS, Ratio
from vlm_safeguard.report.source import Comparison, Setting, Share


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


def measured(row: Row | Ratio) -> Cell:
    """A value with its interval; shares in per cent."""
    if isinstance(row, Row) and row.metric in SHARES:
        interval = f"{percent(row.low)}–{percent(row.high)}"
        return Cell(f"{percent(row.value)} %", interval, row.value, row.value)
    if isinstance(row, Ratio):
        interval = f"{times(row.low)}–{times(row.high)}".replace("×", "")
        return Cell(times(row.value), interval, row.value)
    return Cell(number(row.value), f"{number(row.low)}–{number(row.high)}", row.value)


def benchmark_of(row: Row) -> str:
    """What a row was measured on; the demo's rows have no benchmark's name."""
    return row.benchmark or f"{row.prompts} prompts"


def metric_sheets(
    rows: Sequence[Row],
    metric: str,
    prompts: Iterable[str],
    *,
    chief: str | None,
    folded: bool = False,
) -> list[Sheet]:
    """One table a benchmark and judge: defences down, image conditions across.

    Args:
        prompts: kinds of request.
        chief: the judge whose tables are shown at once; the others' are folded.
        folded: whether they all are.
    """
    chosen = [r for r in rows if r.metric == metric and r.prompts in tuple(prompts)]

    def place(row: Row) -> tuple[str, str]:
        return benchmark_of(row), row.judge or ""

    sheets = []
    order = list(dict.fromkeys(map(place, chosen)))
    benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in order))
    order.sort(key=lambda at: (benchmarks.index(at[0]), at[1] not in (chief, "")))
    for benchmark, judge in order:
        here = [row for row in chosen if place(row) == (benchmark, judge)]
        sheets.append(
            _grid(
                here,
                name="_".join(filter(None, (metric, benchmark, judge))),
                title=f"{benchmark}: {MEASURES[metric]}{judged_by(judge)}",
                caption="With 95 % intervals; n is the number of requests.",
                folded=folded or (chief is not None and judge not in (chief, "")),
            )
        )
    return sheets


def _grid(rows: Sequence[Row], *, name: str, title: str, caption: str, folded: bool) -> Sheet:
    conditions = list(dict.fromkeys(row.condition for row in rows))
    counts = {c: {row.n for row in rows if row.condition == c} for c in conditions}
    cells = {(row.defence, row.condition): row for row in rows}

    def shown(row: Row | None) -> Cell:
        if row is None:
            return EMPTY
        cell = measured(row)
        if len(counts[row.condition]) == 1:
            return cell
        return Cell(cell.text, f"{cell.small}, n = {row.n}", cell.number, cell.share)

    return Sheet(
        name=name,
        title=title,
        caption=caption,
        header=(
            "defence",
            *(
                condition_name(c) + (f" (n = {min(counts[c])})" if len(counts[c]) == 1 else "")
                for c in conditions
            ),
        ),
        lines=tuple(
            (Cell(defence), *(shown(cells.get((defence, c))) for c in conditions))
            for defence in dict.fromkeys(row.defence for row in rows)
        ),
        folded=folded,
    )


def ratio_sheets(ratios: Sequence[Ratio]) -> list[Sheet]:
    """Cost and fluency over the unguarded model's, a table for each kind of request."""
    sheets = []
    for kind in dict.fromkeys(ratio.prompts for ratio in ratios):
        here = {(r.defence, r.metric): r for r in ratios if r.prompts == kind}
        metrics = [metric for metric in RATIOS if any(metric == m for _, m in here)]
        sheets.append(
            Sheet(
                name=f"ratios_{kind}",
                title=f"{kind.capitalize()} requests, as ratios",
                caption=f"Defended over unguarded on the same {kind} requests, all benchmarks and "
                "images together; 95 % intervals of a paired bootstrap over requests.",
                header=("defence", *metrics),
                lines=tuple(
                    (Cell(defence), *(_ratio(here.get((defence, metric))) for metric in metrics))
                    for defence in dict.fromkeys(defence for defence, _ in here)
                ),
            )
        )
    return sheets


def _ratio(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return EMPTY
    cell = measured(ratio)
    return Cell(cell.text, f"{cell.small}, n = {ratio.n}", cell.number)


def mcnemar_sheets(found: Sequence[Comparison]) -> list[Sheet]:
    """The default against each other defence on the same prompts, one table a benchmark."""

    def place(test: Comparison) -> tuple[str, str, str]:
        return test.benchmark or "prompts", test.metric, test.judge or ""

    sheets = []
    for at in dict.fromkeys(map(place, found)):
        benchmark, metric, judge = at
        tests = [test for test in found if place(test) == at]
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


def agreement_sheets(found: Sequence[Agreement]) -> list[Sheet]:
    """Cohen's κ of each pair of judges, and the confusion table of each."""
    if not found:
        return []
    overview = Sheet(
        name="agreement",
        title="Cohen's κ",
        caption="Agreement of judges on the same answers, corrected for chance: 1 is full "
        "agreement, 0 what chance gives. Left out: one of them said nothing.",
        header=("judges", "on", "κ", "n", "left out"),
        lines=tuple(
            (
                Cell(f"{judge_name(pair.judge_a)} and {judge_name(pair.judge_b)}"),
                Cell(QUESTIONS[pair.question]),
                EMPTY if pair.kappa is None else Cell(f"{pair.kappa:.2f}", "", pair.kappa),
                Cell(f"{pair.n:,}", "", float(pair.n)),
                Cell(f"{pair.left_out:,}", "", float(pair.left_out)),
            )
            for pair in found
        ),
    )
    return [overview, *map(_confusion, found)]


def _confusion(pair: Agreement) -> Sheet:
    a, b = judge_name(pair.judge_a), judge_name(pair.judge_b)
    total = max(1, sum(map(sum, pair.table)))

    def count(number: int) -> Cell:
        return Cell(f"{number:,}", f"{percent(number / total)} %", float(number), number / total)

    words = ("failed", "succeeded") if pair.question == "succeeded" else ("not refused", "refused")
    return Sheet(
        name=f"confusion_{pair.question}_{pair.judge_a}_{pair.judge_b}",
        title=f"{a} and {b} on {QUESTIONS[pair.question]}",
        caption=f"By {a}: down; by {b}: across.",
        header=(f"by {a}", *(f"{word}, by {b}" for word in words)),
        lines=tuple(
            (Cell(word), *map(count, line)) for word, line in zip(words, pair.table, strict=True)
        ),
    )


def frontier_sheet(frontier: Sequence[Setting]) -> Sheet:
    """Attack success and over-refusal at every setting that was tried."""

    def share(found: Share) -> Cell:
        interval = f"{percent(found.low)}–{percent(found.high)}, n = {found.n}"
        return Cell(f"{percent(found.value)} %", interval, found.value, found.value)

    return Sheet(
        name="frontier",
        title="Every setting of the sweeps",
        caption="Attack success against over-refusal as the edit's strength and the gate's "
        "threshold change, with 95 % intervals.",
        header=("knob", "setting", "images", "attack success", "over-refusal"),
        lines=tuple(
            (
                Cell(point.knob),
                Cell(number(point.setting), "", point.setting),
                Cell(condition_name(point.condition)),
                share(point.attack_success),
                share(point.over_refusal),
            )
            for point in frontier
        ),
        folded=True,
    )


def published_sheet(results: Results, judge: str | None) -> Sheet | None:
    """Published figures beside ours; None where nothing was published on this model.

    Args:
        judge: whose word of attack success is ours.
    """
    lines = []
    for figure in published_for(results.model):
        ours = [
            row
            for row in results.rows
            if row.defence == figure.ours
            and row.benchmark == figure.benchmark
            and row.metric == figure.metric
            and row.condition in figure.conditions
            and row.judge == judge
        ]
        about = "about " if figure.about else ""
        theirs = Cell(f"{about}{percent(figure.value)} %", figure.source, figure.value)
        condition = " or ".join(map(condition_name, figure.conditions))
        for row in ours:
            cell = measured(row)
            judged = f", by {judge_name(row.judge)}" if row.judge else ""
            mine = Cell(
                cell.text,
                f"{condition_name(row.condition)}, {cell.small}, n = {row.n}{judged}",
                cell.number,
                cell.share,
            )
            lines.append(
                (Cell(figure.benchmark), Cell(condition), Cell(figure.defence), theirs, mine)
            )
        if not ours:
            lines.append(
                (
                    Cell(figure.benchmark),
                    Cell(condition),
                    Cell(figure.defence),
                    theirs,
                    Cell("not measured"),
                )
            )
    if not lines:
        return None
    return Sheet(
        name="published",
        title="Published figures beside ours",
        caption=f"Attack success on {results.model} as published, and here. Judges and "
        "decoding may differ, and “jailbreak” holds our prompts in the paper's form.",
        header=("benchmark", "images", "defence", "published", "here"),
        lines=tuple(lines),
    )


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


def facts_sheet(name: str, title: str, caption: str, facts: dict[str, Any]) -> Sheet:
    """Names and values."""
    return Sheet(
        name=name,
        title=title,
        caption=caption,
        header=("what", "value"),
        lines=tuple((Cell(key), Cell(str(value))) for key, value in facts.items()),
    )


def is_default(line: tuple[Cell, ...]) -> bool:
    """Whether a line is about the default guard, to be set apart."""
    return line[0].text == DEFAULT
