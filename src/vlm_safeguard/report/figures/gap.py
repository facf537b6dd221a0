"""The safety alignment gap: where requests land, with an image and as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from vlm_safeguard.report.figures.style import BLUE, RED, save
from vlm_safeguard.report.names import condition_name

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.results.gap import GapRecord


def gap_figure(gap: GapRecord, path: Path, title: str) -> None:
    """Last-token states in the text-only states' first two principal components.

    Circles: as text; triangles: with an image, unguarded on the left, edited on the right.
    """
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    image = condition_name(gap.condition)
    kinds = (("harmful", RED, "^"), ("harmless", BLUE, "v"))
    for axes, states, name in zip(
        panels, (gap.unguarded, gap.guarded), ("unguarded", "edited"), strict=True
    ):
        for kind, colour, _ in kinds:
            x, y = zip(*(point[:2] for point in getattr(gap.text, kind)), strict=True)
            axes.scatter(
                x,
                y,
                s=26,
                facecolors="none",
                edgecolors=colour,
                alpha=0.85,
                label=f"{kind}, text only",
            )
        for kind, colour, mark in kinds:
            x, y = zip(*(point[:2] for point in getattr(states, kind)), strict=True)
            axes.scatter(
                x, y, s=22, color=colour, marker=mark, alpha=0.75, label=f"{kind}, {image}"
            )
        axes.set_title(name)
        axes.set_xlabel("first principal component")
    panels[0].set_ylabel("second principal component")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)
