"""The frontier: attack success against over-refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from vlm_safeguard.report.figures.style import CYCLE, MARKS, save, spread
from vlm_safeguard.report.names import condition_name

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.results.frontier import Setting


def frontier_figure(frontier: Sequence[Setting], path: Path) -> None:
    """Attack success against over-refusal, a line for each knob, a panel for each condition."""
    conditions = list(dict.fromkeys(point.condition for point in frontier))
    knobs = list(dict.fromkeys(point.knob for point in frontier))
    down = 1 if len(conditions) <= 3 else 2
    across = -(-len(conditions) // down)
    figure = Figure(figsize=(3.4 * across + 0.6, 3.2 * down + 0.7), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axes, condition in zip(panels, conditions, strict=False):
        for number, knob in enumerate(knobs):
            points = [p for p in frontier if (p.condition, p.knob) == (condition, knob)]
            points.sort(key=lambda point: point.setting)
            right, up = [p.over_refusal for p in points], [p.attack_success for p in points]
            x, y = ([100 * share.value for share in shares] for shares in (right, up))
            reach = {"xerr": spread(right, 100), "yerr": spread(up, 100)}
            axes.errorbar(
                x,
                y,
                **reach,
                color=CYCLE[number % len(CYCLE)],
                marker=MARKS[number % len(MARKS)],
                markersize=5,
                linewidth=1.3,
                elinewidth=0.5,
                label=knob,
            )
            ends = sorted({0, len(points) - 1}, key=x.__getitem__) if points else ()
            for end, side in zip(ends, ("right", "left"), strict=False):  # each to its outside
                axes.annotate(
                    f"{points[end].setting:.3g}",
                    (x[end], y[end]),
                    fontsize=9,
                    ha=side,
                    xytext=(-6 if side == "right" else 6, -11 if number % 2 else 4),
                    textcoords="offset points",
                    zorder=4,
                    bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5},
                )
        axes.set_title(condition_name(condition), fontsize=10)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    for axes in list(figure.axes)[len(conditions) :]:
        axes.set_visible(False)
    figure.supxlabel("harmless requests refused, %", fontsize=10)
    figure.supylabel("attack success, %", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, path)
