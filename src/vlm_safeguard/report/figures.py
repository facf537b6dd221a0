"""Results as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vlm_safeguard.evaluation.runner import Row
    from vlm_safeguard.guard import Guard

RED, BLUE = "#c0392b", "#2471a3"
_SHADES = {
    "none": "#7f8c8d",
    "default": "#1e8449",
    "restore": "#7dcea0",
    "project": "#d35400",
    "random": "#e5b07a",
    "flipped": "#922b21",
}
mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def refusal_figure(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of refusal rates with 95 % intervals: harmful above, harmless below."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, prompts, wish in zip(
        panels, ("harmful", "harmless"), ("higher is safer", "lower is better"), strict=True
    ):
        _bars(axes, [r for r in rows if r.prompts == prompts and r.metric == "refusal"])
        axes.set_ylabel(f"{prompts} requests\nrefused, % ({wish})")
        axes.set_ylim(0, 105)
        axes.grid(axis="y", alpha=0.25)
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    conditions = list(dict.fromkeys(row.condition for row in rows))
    defences = list(dict.fromkeys(row.defence for row in rows))
    width = 0.84 / len(defences)
    for place, defence in enumerate(defences):
        cells = {row.condition: row for row in rows if row.defence == defence}
        shown = [(i, cells[c]) for i, c in enumerate(conditions) if c in cells]
        values = [100 * row.value for _, row in shown]
        spread = [
            [100 * (row.value - row.low) for _, row in shown],
            [100 * (row.high - row.value) for _, row in shown],
        ]
        axes.bar(
            [i - 0.42 + (place + 0.5) * width for i, _ in shown],
            values,
            width=width * 0.92,
            label=defence,
            color=_SHADES.get(defence),
            yerr=spread,
            error_kw={"elinewidth": 0.8, "alpha": 0.7},
        )
    names = {"text": "text only", "blank": "+ blank image", "noise": "+ noise image",
             "image": "+ rendered image"}  # fmt: skip
    axes.set_xticks(range(len(conditions)), [names.get(c, c) for c in conditions])


def gap_figure(
    text: tuple[torch.Tensor, torch.Tensor],
    unguarded: tuple[torch.Tensor, torch.Tensor],
    guarded: tuple[torch.Tensor, torch.Tensor],
    path: Path,
    title: str,
) -> None:
    """The safety alignment gap: last-token states in the text-only states' first two components.

    Args:
        text: (n, hidden) harmful and harmless states of the requests without an image.
        unguarded: the same with an image.
        guarded: the same with an image and the guard.
    """
    both = torch.cat(text)
    centre = both.mean(0)
    _, _, axes_of = torch.linalg.svd(both - centre, full_matrices=False)
    plane = axes_of[:2]
    if ((text[0] - centre) @ plane[0]).mean() < ((text[1] - centre) @ plane[0]).mean():
        plane = -plane
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, shown, name in zip(
        panels, (unguarded, guarded), ("unguarded", "guarded"), strict=True
    ):
        for states, colour, label in zip(text, (RED, BLUE), ("harmful", "harmless"), strict=True):
            x, y = ((states - centre) @ plane.mT).T
            axes.scatter(x, y, s=26, facecolors="none", edgecolors=colour, alpha=0.6,
                         label=f"{label}, text only")  # fmt: skip
        for states, colour, label in zip(shown, (RED, BLUE), ("harmful", "harmless"), strict=True):
            x, y = ((states - centre) @ plane.mT).T
            axes.scatter(x, y, s=22, color=colour, marker="^", alpha=0.75,
                         label=f"{label}, + blank image")  # fmt: skip
        axes.set_title(name)
        axes.set_xlabel("first principal component")
    panels[0].set_ylabel("second principal component")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def guard_figure(guard: Guard, path: Path) -> None:
    """An artifact at a glance: AUROC by layer, singular spectra, and the gate's scores."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    quality, spectrum, scores = figure.subplots(1, 3)
    layers = range(len(guard.directions.auroc))
    quality.axvspan(guard.layers[0] - 0.5, guard.layers[-1] + 0.5, color="#1e8449", alpha=0.12)
    quality.plot(layers, guard.directions.auroc, marker="o", markersize=3, color=RED)
    quality.set(xlabel="decoder layer", ylabel="held-out AUROC",
                title="How well harm is told apart (shaded: edited)")  # fmt: skip
    for layer, shade in zip((guard.layers[0], guard.layers[-1]), (BLUE, RED), strict=True):
        values = guard.directions.spectrum[layer]
        energy = (values.square() / values.square().sum())[: max(20, guard.rank + 8)]
        spectrum.plot(range(1, len(energy) + 1), energy, marker="o", markersize=3, color=shade,
                      label=f"layer {layer}")  # fmt: skip
    spectrum.axvline(guard.rank + 0.5, color="grey", linestyle=":", label=f"rank {guard.rank}")
    spectrum.set(xlabel="singular value", ylabel="share of the energy", title="Spectrum of A")
    spectrum.legend(frameon=False)
    for name, shade, label in (
        ("harmful", RED, "harmful anchors, held out"),
        ("harmless", BLUE, "harmless anchors, held out"),
        ("calibration", "#7f8c8d", "calibration requests"),
    ):
        if name in guard.scores:
            scores.hist(guard.scores[name].numpy(), bins=30, color=shade, alpha=0.55, label=label)
    threshold = getattr(guard.gate, "text_threshold", None)
    if threshold is not None:
        scores.axvline(threshold, color="black", linestyle="--", label="threshold")
    scores.set(xlabel="gate's text score", ylabel="requests", title="Gate")
    scores.legend(frameon=False, fontsize=8, loc="upper center", ncols=2,
                  bbox_to_anchor=(0.5, -0.14))  # fmt: skip
    figure.savefig(path, dpi=130)
