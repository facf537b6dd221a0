"""Results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

from vlm_safeguard.evaluation.probes.gap import principal_plane
from vlm_safeguard.policy.gate import TextScore
from vlm_safeguard.report.names import condition_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vlm_safeguard.evaluation.results.rows import Row
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.report.ratios import Ratio
    from vlm_safeguard.report.source import Setting, Share

# after Okabe and Ito, told apart with every common kind of colour blindness
RED, GREEN, GREY = "#d55e00", "#009e73", "#8c8c8c"
BLUE = "C0"  # the first of the cycle, which is lighter on dark ground
_SHADES = {
    "none": GREY,
    "default": GREEN,
    "restore": "#7fceb9",
    "refuse": "#7fceb9",
    "project": RED,
    "vlm-guard-project": RED,
    "vlm-guard-add": RED,
    "random": "#e69f00",
    "flipped": "#b04a00",
}
_OTHERS = "#56b4e9"  # defences of others
_REST = (RED, GREEN, "#cc79a7", "#e69f00", "#56b4e9")
_CYCLE = (BLUE, *_REST)
_MARKS = "os^Dvp"
DARK: dict[Any, Any] = {
    "figure.facecolor": "#16191d",
    "axes.facecolor": "#16191d",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
        "#d7dce2",
    ),
    "axes.prop_cycle": cycler(color=("#4aa3df", *_REST)),
}
mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=("#0072b2", *_REST)),
    }
)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _ink() -> str:
    """The colour of text, for what would be black by default."""
    return str(mpl.rcParams["text.color"])


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
    _save(figure, path)


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
            color=_SHADES.get(defence, _OTHERS),
            yerr=_spread([row for _, row in shown], 100),
            ecolor=_ink(),
            error_kw={"elinewidth": 0.8, "alpha": 0.7},
        )
    axes.set_xticks(range(len(conditions)), [condition_name(c) for c in conditions])


def _spread(rows: Sequence[Row | Ratio | Share], scale: float = 1) -> list[list[float]]:
    """How far the interval reaches below and above each value."""
    return [
        [max(0.0, scale * (row.value - row.low)) for row in rows],
        [max(0.0, scale * (row.high - row.value)) for row in rows],
    ]


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
            color=[_SHADES.get(row.defence, _OTHERS) for _, row in shown],
            xerr=_spread([row for _, row in shown], 100),
            ecolor=_ink(),
            error_kw={"elinewidth": 0.9, "alpha": 0.8},
        )
        axes.set_title(condition_name(condition), fontsize=10)
        axes.set_xlim(0, 104)
        axes.set_xticks((0, 50, 100))
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(defences)), defences)
    panels[0].set_ylim(len(defences) - 0.4, -0.6)
    figure.supxlabel(label, fontsize=10)
    _save(figure, path)


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
            reach = {"xerr": _spread(right, 100), "yerr": _spread(up, 100)}
            axes.errorbar(
                x,
                y,
                **reach,
                color=_CYCLE[number % len(_CYCLE)],
                marker=_MARKS[number % len(_MARKS)],
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
    _save(figure, path)


def cost_figure(ratios: Sequence[Ratio], path: Path) -> None:
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
                xerr=_spread([r for _, r in shown]),
                linestyle="none",
                marker=_MARKS[number],
                markersize=4,
                elinewidth=1,
                color=_CYCLE[number],
                label=f"{kind} requests",
            )
        axes.axvline(1, color=_ink(), linewidth=0.8, linestyle=":")
        axes.set_title(metric, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(defences)), defences)
    panels[0].set_ylim(len(defences) - 0.4, -0.6)
    figure.supxlabel("times the unguarded model's", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    _save(figure, path)


def gap_figure(
    text: tuple[torch.Tensor, torch.Tensor],
    unguarded: tuple[torch.Tensor, torch.Tensor],
    guarded: tuple[torch.Tensor, torch.Tensor],
    path: Path,
    title: str,
    *,
    condition: str = "blank",
) -> None:
    """The safety alignment gap: last-token states in the text-only states' first two components.

    Args:
        text: (n, hidden) harmful and harmless states of the requests without an image; points in
            a plane do as well.
        unguarded: the same with an image.
        guarded: the same with an image and the guard.
        condition: which image.
    """
    centre, plane = principal_plane(text)
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    image = condition_name(condition)
    for axes, shown, name in zip(
        panels, (unguarded, guarded), ("unguarded", "guarded"), strict=True
    ):
        for states, colour, label in zip(text, (RED, BLUE), ("harmful", "harmless"), strict=True):
            x, y = ((states - centre) @ plane.mT).T
            axes.scatter(
                x,
                y,
                s=26,
                facecolors="none",
                edgecolors=colour,
                alpha=0.85,
                label=f"{label}, text only",
            )
        for states, colour, mark, label in zip(
            shown, (RED, BLUE), "^v", ("harmful", "harmless"), strict=True
        ):
            x, y = ((states - centre) @ plane.mT).T
            axes.scatter(
                x, y, s=22, color=colour, marker=mark, alpha=0.75, label=f"{label}, {image}"
            )
        axes.set_title(name)
        axes.set_xlabel("first principal component")
    panels[0].set_ylabel("second principal component")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


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
    _save(figure, path)


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
    _save(figure, path)


def spectra_figure(guard: Guard, path: Path) -> None:
    """Singular spectra of the first, the middle and the last edited layer."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    layers = guard.policy.layers
    _spectrum(axes, guard, dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])))
    axes.grid(axis="y", alpha=0.25)
    _save(figure, path)


def gate_figure(guard: Guard, path: Path) -> None:
    """The gate's scores at fitting, and its threshold."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    _scores(figure.subplots(), guard)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    _save(figure, path)


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
            marker=_MARKS[(number + 1) % len(_MARKS)],
            markersize=3.5,
            linestyle="--",
            color=shades[number % len(shades)],
            label=f"requests, {condition_name(condition)}",
        )
    axes.set(xlabel="decoder layer", ylabel="held-out AUROC" if not measured else "AUROC")


def _spectrum(axes: Axes, guard: Guard, layers: Sequence[int] | Mapping[int, Any]) -> None:
    for layer, shade, mark in zip(layers, (BLUE, RED, GREEN), "osv", strict=False):
        values = guard.policy.directions.spectrum[layer]
        energy = (values.square() / values.square().sum())[: max(20, guard.policy.rank + 8)]
        axes.plot(
            range(1, len(energy) + 1),
            energy,
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
    score = guard.policy.criterion(TextScore)
    if score is not None:
        axes.axvline(score.threshold, color=_ink(), linestyle="--", label="threshold")
    axes.set(xlabel="gate's text score", ylabel="requests")
