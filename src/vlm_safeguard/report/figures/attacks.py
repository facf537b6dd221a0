"""Attack success by attack and ε, a line for each defence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from vlm_safeguard.report.figures.style import CYCLE, DEFENCE_COLOURS, MARKS, save, spread
from vlm_safeguard.report.names import attack_name, epsilon_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vlm_safeguard.evaluation.results.attacks import AttackRow

_APART = 0.6  # of the way from one attack to the next, which the defences share
_NAMED = {"pgd": "PGD, an image each", "universal": "one image for all"}


def attacks_figure(rows: Sequence[AttackRow], path: Path) -> None:
    """A panel for each attack on the pixels, by ε, and one for the others.

    Args:
        rows: attack success by one judge, from one kind of image, and of text alone.
    """
    defences = list(dict.fromkeys(row.defence for row in rows))
    pixels = list(dict.fromkeys(row.attack for row in rows if row.epsilon is not None))
    others = [row for row in rows if row.epsilon is None and row.attack != "none"]
    titles = [*(_NAMED[name] for name in pixels), *(["other attacks"] if others else [])]
    figure = Figure(figsize=(1.6 + 3.2 * len(titles), 3.9), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    unattacked = [row for row in rows if row.attack == "none"]
    for axes, title, name in zip(panels, titles, [*pixels, None], strict=False):
        shown = others if name is None else [row for row in rows if row.attack == name]
        _panel(axes, [*unattacked, *shown], defences, by_epsilon=name is not None)
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("requests followed, % (lower is safer)")
    panels[0].set_ylim(-3, 103)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False
    )
    save(figure, path)


def _panel(
    axes: Axes, rows: Sequence[AttackRow], defences: Sequence[str], *, by_epsilon: bool
) -> None:
    columns = list(dict.fromkeys(_tick(row, by_epsilon) for row in rows))
    free = cycle(colour for colour in CYCLE if colour not in DEFENCE_COLOURS.values())
    colours = {defence: DEFENCE_COLOURS.get(defence) or next(free) for defence in defences}
    for number, defence in enumerate(defences):
        own = [row for row in rows if row.defence == defence]
        places = [
            columns.index(_tick(row, by_epsilon)) + _APART * ((number + 0.5) / len(defences) - 0.5)
            for row in own
        ]
        axes.errorbar(
            places,
            [100 * row.value for row in own],
            yerr=spread(own, 100),
            linestyle="none",
            marker=MARKS[number % len(MARKS)],
            markersize=5,
            elinewidth=1,
            color=colours[defence],
            label=defence,
        )
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.grid(axis="y", alpha=0.25)


def _tick(row: AttackRow, by_epsilon: bool) -> str:
    """Where a share stands."""
    if row.condition == "text":
        return "text\nonly"
    if row.attack == "none":
        return "image\nas it is"
    return (
        epsilon_name(row.epsilon).replace(" = ", "\n")
        if by_epsilon
        else attack_name(row).replace(" ", "\n", 1)
    )
