"""What the programs measure, cell by cell: kept as soon as it is there, and shown."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from machine import machine
from models import NAMES
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.report.figures.style import BLUE, RED
from vlm_safeguard.timing import Ratio, interleave

FOLDER = Path("bench-output")  # ours, in results/, were measured on another machine
_ROUNDING = 0.005  # targets have two digits
_WIDTH = 150  # characters that a line of the table needs
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One measured number.

    Attributes:
        unit: "×" for ratios.
        middle: quartiles of the rounds; None where there was one measurement.
        rounds: how many there were.
        target: what it should not exceed; None where nothing is promised.
        note: what stands beside it, in words.
    """

    name: str
    value: float
    unit: str
    middle: tuple[float, float] | None = None
    rounds: int = 1
    target: float | None = None
    note: str = ""

    @classmethod
    def ratio(cls, name: str, ratio: Ratio, target: float | None = None, note: str = "") -> Cell:
        """The cell of a ratio of times."""
        return cls(name, ratio.median, "×", ratio.middle, ratio.pairs, target, note)

    @property
    def verdict(self) -> str:
        """Whether the median meets the target, and whether half of the rounds agree."""
        if self.target is None:
            return ""
        limit = self.target + _ROUNDING
        met = self.value <= limit
        low, high = self.middle or (self.value, self.value)
        split = low <= limit < high
        return ("met" if met else "not met") + (", spread across it" if split else "")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all, whenever it is stopped; its folder, where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


class Sheet:
    """The cells of one program on one model: a JSON file that grows, a table and a chart."""

    def __init__(self, program: str, asked: Namespace, model: Any) -> None:
        self.title = f"{program}, {asked.model}"
        self.path = asked.out / f"{program}-{asked.model}.json"
        self.machine = machine(model)
        self.cells: dict[str, Cell] = {}
        asked.out.mkdir(parents=True, exist_ok=True)
        if asked.fresh or not self.path.is_file():
            return
        there = json.loads(self.path.read_text("utf-8"))
        if there["machine"] != self.machine:
            raise SafeguardError(
                f"{self.path} was measured elsewhere ({there['machine']}). Add --fresh to replace "
                "it, or --out to write into another folder."
            )
        for cell in there["cells"]:
            del cell["verdict"]  # it follows from the rest
            cell["middle"] = cell["middle"] and tuple(cell["middle"])
            self.cells[cell["name"]] = Cell(**cell)

    def lacks(self, names: Iterable[str]) -> bool:
        """Whether any of these cells is still to be measured."""
        return not set(names) <= self.cells.keys()

    def add(self, *cells: Cell) -> None:
        """Keep cells, in the file too."""
        self.cells |= {cell.name: cell for cell in cells}
        told = {
            "machine": self.machine,
            "cells": [
                _rounded(asdict(cell)) | {"verdict": cell.verdict} for cell in self.cells.values()
            ],
        }
        write(self.path, told)

    def show(self) -> None:
        """Print the table, and write the chart beside the JSON file."""
        table = Table(title=self.title, caption=f"{self.path}; {self.machine['cpu']}", box=SIMPLE)
        for name in ("", "median", "middle half", "rounds", "target", "", "note"):
            words = name in ("", "note")
            table.add_column(name, justify="left" if words else "right", no_wrap=name != "note")
        for cell in self.cells.values():
            table.add_row(
                cell.name,
                _said(cell.value, cell.unit),
                "–".join(f"{x:.3f}" for x in cell.middle) if cell.middle else "",
                str(cell.rounds),
                "" if cell.target is None else f"≤ {_said(cell.target, cell.unit)}",
                cell.verdict,
                cell.note,
            )
        Console(width=max(_WIDTH, Console().width)).print(table)
        chart(
            [cell for cell in self.cells.values() if cell.unit == "×"],
            self.path.with_suffix(".png"),
            self.title,
        )


def _rounded(value: Any) -> Any:
    """Plain values with five digits after the point: more is noise."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value


def _said(value: float, unit: str) -> str:
    return f"{value:.3f}×" if unit == "×" else f"{value:.3g} {unit}"


def chart(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Ratios as points with their middle half; a red tick where the target is."""
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for place, cell in enumerate(cells):
        low, high = cell.middle or (cell.value, cell.value)
        axes.plot([low, high], [place, place], color=BLUE, linewidth=4, alpha=0.35)
        axes.plot([cell.value], [place], "o", color=BLUE, markersize=5)
        if cell.target is not None:
            axes.plot([cell.target], [place], "|", color=RED, markersize=12, markeredgewidth=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(cells)), [cell.name for cell in cells])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    axes.set(xlabel="ratio: median, middle half of the rounds; red: target", title=title)
    figure.savefig(path, dpi=130)


def in_turns(label: str, runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """`timing.interleave`, with a bar of progress."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    ) as bar:
        task = bar.add_task(label, total=(rounds + 1) * len(runs))

        def counted(run: Callable[[], T]) -> Callable[[], T]:
            def call() -> T:
                value = run()
                bar.advance(task)
                return value

            return call

        return interleave({name: counted(run) for name, run in runs.items()}, rounds)


def parser(about: str | None, rounds: int) -> ArgumentParser:
    """The arguments that the programs share."""
    made = ArgumentParser(description=about)
    made.add_argument("model", choices=NAMES)
    made.add_argument("--rounds", type=int, default=rounds, help=f"of runs in turns ({rounds})")
    made.add_argument("--out", type=Path, default=FOLDER, help="folder for JSON and chart")
    made.add_argument("--fresh", action="store_true", help="measure again what is there")
    return made


def told(main: Callable[[], None]) -> None:
    """Run a program; what the user can mend is one sentence, not a traceback."""
    try:
        main()
    except SafeguardError as error:
        sys.exit(str(error))
