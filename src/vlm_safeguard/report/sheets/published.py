"""Published figures beside ours."""

from __future__ import annotations

from dataclasses import replace

from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.report.names import condition_name, judge_name, percent
from vlm_safeguard.report.published import published_for
from vlm_safeguard.report.sheets.sheet import Cell, Sheet, measured


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
        names = (
            Cell(figure.benchmark),
            Cell(" or ".join(map(condition_name, figure.conditions))),
            Cell(figure.defence),
            Cell(f"{about}{percent(figure.value)} %", figure.source, figure.value),
        )
        lines += [(*names, _measured_here(row)) for row in ours]
        if not ours:
            lines.append((*names, Cell("not measured")))
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


def _measured_here(row: Row) -> Cell:
    cell = measured(row)
    judged = f", by {judge_name(row.judge)}" if row.judge else ""
    small = f"{condition_name(row.condition)}, {cell.small}, n = {row.n}{judged}"
    return replace(cell, small=small)
