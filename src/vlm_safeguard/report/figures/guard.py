"""What a guard was fitted on: AUROC by layer, singular spectra, the gate's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlm_safeguard.report.figures.style import BLUE, GREEN, GREY, MARKS, RED, ink, save
from vlm_safeguard.report.names import condition_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vlm_safeguard.guard import Guard


def guard_figure(guard: Guard, path: Path) -> None:
    """An artifact at a glance: AUROC by layer, singular spectra, and the gate's scores."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    quality, spectrum, scores = figure.subplots(1, 3)
    _quality(quality, guard, {})
    quality.set_title("How well harm is told apart (shaded: edited)")
    _spectrum(spectrum, guard, (guard.policy.layers[0], guard.policy.layers[-1]))
    spectrum.set_title("Spectrum of A")
    _scores(scores, guard)
    scores.set_title("Gate")
    scores.legend(
        frameon=False, fontsize=8, loc="upper center", ncols=2, bbox_to_anchor=(0.5, -0.14)
    )
    save(figure, path)


def auroc_figure(guard: Guard, measured: Mapping[str, Sequence[float]], path: Path) -> None:
    """How well harm is told apart in each layer.

    Args:
        measured: by image condition, the AUROC of requests of that kind in every layer.
    """
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    _quality(axes, guard, measured)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    save(figure, path)


def spectra_figure(guard: Guard, path: Path) -> None:
    """Singular spectra of the first, the middle and the last edited layer."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    layers = guard.policy.layers
    _spectrum(axes, guard, dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])))
    axes.grid(axis="y", alpha=0.25)
    save(figure, path)


def gate_figure(guard: Guard, path: Path) -> None:
    """The gate's scores at fitting, and its threshold."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    _scores(figure.subplots(), guard)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    save(figure, path)


def _quality(axes: Axes, guard: Guard, measured: Mapping[str, Sequence[float]]) -> None:
    axes.axvspan(
        guard.policy.layers[0] - 0.5,
        guard.policy.layers[-1] + 0.5,
        color=GREEN,
        alpha=0.12,
        label="edited layers",
    )
    axes.plot(
        range(len(guard.policy.directions.auroc)),
        guard.policy.directions.auroc,
        marker="o",
        markersize=3,
        color=RED,
        label="anchors, held out, as text",
    )
    shades = (BLUE, "#cc79a7", "#e69f00", "#56b4e9", GREY)
    for number, (condition, values) in enumerate(measured.items()):
        axes.plot(
            range(len(values)),
            values,
            marker=MARKS[(number + 1) % len(MARKS)],
            markersize=3.5,
            linestyle="--",
            color=shades[number % len(shades)],
            label=f"requests, {condition_name(condition)}",
        )
    axes.set(xlabel="decoder layer", ylabel="held-out AUROC" if not measured else "AUROC")


def _spectrum(axes: Axes, guard: Guard, layers: Sequence[int] | Mapping[int, Any]) -> None:
    for layer, shade, mark in zip(layers, (BLUE, RED, GREEN), "osv", strict=False):
        shares = guard.policy.directions.energy_shares[layer, : max(20, guard.policy.rank + 8)]
        axes.plot(
            range(1, len(shares) + 1),
            shares,
            marker=mark,
            markersize=3,
            color=shade,
            label=f"layer {layer}",
        )
    axes.axvline(
        guard.policy.rank + 0.5, color="grey", linestyle=":", label=f"rank {guard.policy.rank}"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="singular value", ylabel="share of the energy")
    axes.legend(frameon=False)


def _scores(axes: Axes, guard: Guard) -> None:
    for name, shade, label in (
        ("calibration", GREY, "calibration requests"),
        ("harmless", BLUE, "harmless anchors, held out"),
        ("harmful", RED, "harmful anchors, held out"),
    ):
        if name in guard.scores:
            axes.hist(guard.scores[name].numpy(), bins=30, color=shade, alpha=0.55, label=label)
    if (score := guard.policy.text_criterion) is not None:
        axes.axvline(score.threshold, color=ink(), linestyle="--", label="threshold")
    axes.set(xlabel="gate's text score", ylabel="requests")
