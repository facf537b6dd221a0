"""How every figure looks: colours, marks, and the file it is written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# after Okabe and Ito, told apart with every common kind of colour blindness
RED, GREEN, GREY = "#d55e00", "#009e73", "#8c8c8c"
BLUE = "C0"  # the first of the cycle, which is lighter on dark ground
DEFENCE_COLOURS = {
    "none": GREY,
    "default": GREEN,
    # what else its gate can lead to
    **dict.fromkeys(("text", "restore", "refuse", "rank-1", "rank-8", "rank-full"), "#7fceb9"),
    # the paper's, taken literally
    **dict.fromkeys(("project", "vlm-guard-project", "vlm-guard-add"), RED),
    # controls
    **dict.fromkeys(("canned", "text-always", "random", "flipped"), "#e69f00"),
}
OTHERS = "#56b4e9"  # defences of others
_REST = (RED, GREEN, "#cc79a7", "#e69f00", "#56b4e9")
CYCLE = (BLUE, *_REST)
MARKS = "os^Dvp"
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


class Interval(Protocol):
    """A value with the ends of its 95 % interval: a row, a ratio, a share."""

    @property
    def value(self) -> float:
        """What was measured."""

    @property
    def low(self) -> float:
        """The interval's lower end."""

    @property
    def high(self) -> float:
        """The interval's upper end."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without a mark of what made it."""
    figure.savefig(path, dpi=130, metadata={"Software": None})


def ink() -> str:
    """The colour of text, for what would be black by default."""
    return str(mpl.rcParams["text.color"])


def spread(rows: Sequence[Interval], scale: float = 1) -> list[list[float]]:
    """How far the interval reaches below and above each value."""
    return [
        [max(0.0, scale * (row.value - row.low)) for row in rows],
        [max(0.0, scale * (row.high - row.value)) for row in rows],
    ]
