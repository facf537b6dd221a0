"""The rows of one measure: defences down, image conditions across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.report.names import MEASURES, condition_name, judged_by
from vlm_safeguard.report.sheets.sheet import EMPTY, Cell, Sheet, measured


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
        return row.benchmark_name, row.judge or ""

    sheets = []
    order = list(dict.fromkeys(map(place, chosen)))
    benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in order))
    order.sort(key=lambda at: (benchmarks.index(at[0]), at[1] not in (chief, "")))
    for benchmark, judge in order:
        group = [row for row in chosen if place(row) == (benchmark, judge)]
        sheets.append(
            _grid(
                group,
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
