"""Cost: tokens, seconds and perplexity over the unguarded model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from vlm_safeguard.report.figures.style import CYCLE, MARKS, ink, save, spread

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.results.ratios import CostRatio


def cost_figure(ratios: Sequence[CostRatio], path: Path) -> None:
    """Ratios over the unguarded model with 95 % intervals: a panel for each measure."""
    metrics = list(dict.fromkeys(ratio.metric for ratio in ratios))
    defences = list(dict.fromkeys(ratio.defence for ratio in ratios))
    kinds = list(dict.fromkeys(ratio.prompts for ratio in ratios))
    figure = Figure(
        figsize=(2 + 2.2 * len(metrics), 1.4 + 0.36 * len(defences)), layout="constrained"
    )
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for number, kind in enumerate(kinds):
            shown = [
                (defences.index(r.defence) + 0.22 * (number - (len(kinds) - 1) / 2), r)
                for r in ratios
                if (r.metric, r.prompts) == (metric, kind)
            ]
            axes.errorbar(
                [r.value for _, r in shown],
                [place for place, _ in shown],
                xerr=spread([r for _, r in shown]),
                linestyle="none",
                marker=MARKS[number],
                markersize=4,
                elinewidth=1,
                color=CYCLE[number],
                label=f"{kind} requests",
            )
        axes.axvline(1, color=ink(), linewidth=0.8, linestyle=":")
        axes.set_title(metric, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(defences)), defences)
    panels[0].set_ylim(len(defences) - 0.4, -0.6)
    figure.supxlabel("times the unguarded model's", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, path)
