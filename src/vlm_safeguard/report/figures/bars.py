"""Shares as bars: defences on each image condition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from vlm_safeguard.report.figures.style import DEFENCE_COLOURS, OTHERS, ink, save, spread
from vlm_safeguard.report.names import condition_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vlm_safeguard.evaluation.results.rows import Row


def bars_figure(rows: Sequence[Row], path: Path, label: str) -> None:
    """Shares with 95 % intervals: defences down, a panel for each image condition.

    Args:
        rows: of one benchmark, metric and judge.
        label: what is counted, below the bars.
    """
    conditions = list(dict.fromkeys(row.condition for row in rows))
    defences = list(dict.fromkeys(row.defence for row in rows))
    size = (max(5.0, 1.6 + 1.7 * len(conditions)), 1.1 + 0.27 * len(defences))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    for axes, condition in zip(panels, conditions, strict=True):
        cells = {row.defence: row for row in rows if row.condition == condition}
        shown = [(i, cells[d]) for i, d in enumerate(defences) if d in cells]
        axes.barh(
            [i for i, _ in shown],
            [100 * row.value for _, row in shown],
            height=0.74,
            color=[DEFENCE_COLOURS.get(row.defence, OTHERS) for _, row in shown],
            xerr=spread([row for _, row in shown], 100),
            ecolor=ink(),
            error_kw={"elinewidth": 0.9, "alpha": 0.8},
        )
        axes.set_title(condition_name(condition), fontsize=10)
        axes.set_xlim(0, 104)
        axes.set_xticks((0, 50, 100))
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(defences)), defences)
    panels[0].set_ylim(len(defences) - 0.4, -0.6)
    figure.supxlabel(label, fontsize=10)
    save(figure, path)


def refusal_figure(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of refusal rates with 95 % intervals: harmful above, harmless below."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, prompts, wish in zip(
        panels, ("harmful", "harmless"), ("higher is safer", "lower is better"), strict=True
    ):
        _columns(axes, [r for r in rows if r.prompts == prompts and r.metric == "refusal"])
        axes.set_ylabel(f"{prompts} requests\nrefused, % ({wish})")
        axes.set_ylim(0, 105)
        axes.grid(axis="y", alpha=0.25)
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)


def _columns(axes: Axes, rows: Sequence[Row]) -> None:
    conditions = list(dict.fromkeys(row.condition for row in rows))
    defences = list(dict.fromkeys(row.defence for row in rows))
    width = 0.84 / len(defences)
    for place, defence in enumerate(defences):
        cells = {row.condition: row for row in rows if row.defence == defence}
        shown = [(i, cells[c]) for i, c in enumerate(conditions) if c in cells]
        axes.bar(
            [i - 0.42 + (place + 0.5) * width for i, _ in shown],
            [100 * row.value for _, row in shown],
            width=width * 0.92,
            label=defence,
            color=DEFENCE_COLOURS.get(defence, OTHERS),
            yerr=spread([row for _, row in shown], 100),
            ecolor=ink(),
            error_kw={"elinewidth": 0.8, "alpha": 0.7},
        )
    axes.set_xticks(range(len(conditions)), [condition_name(c) for c in conditions])
