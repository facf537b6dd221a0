"""Cost and fluency over the unguarded model's."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_safeguard.evaluation.results.ratios import COST_METRICS, CostRatio
from vlm_safeguard.report.sheets.sheet import EMPTY, Cell, Sheet, measured


def ratio_sheets(ratios: Sequence[CostRatio]) -> list[Sheet]:
    """Cost and fluency over the unguarded model's, a table for each kind of request."""
    sheets = []
    for kind in dict.fromkeys(ratio.prompts for ratio in ratios):
        cells = {(r.defence, r.metric): r for r in ratios if r.prompts == kind}
        metrics = [metric for metric in COST_METRICS if any(metric == m for _, m in cells)]
        sheets.append(
            Sheet(
                name=f"ratios_{kind}",
                title=f"{kind.capitalize()} requests, as ratios",
                caption=f"Defended over unguarded on the same {kind} requests, all benchmarks and "
                "images together; 95 % intervals of a paired bootstrap over requests.",
                header=("defence", *metrics),
                lines=tuple(
                    (Cell(defence), *(_ratio(cells.get((defence, metric))) for metric in metrics))
                    for defence in dict.fromkeys(defence for defence, _ in cells)
                ),
            )
        )
    return sheets


def _ratio(ratio: CostRatio | None) -> Cell:
    if ratio is None:
        return EMPTY
    cell = measured(ratio)
    return Cell(cell.text, f"{cell.small}, n = {ratio.n}", cell.number)
