"""The tables of what gates open for, and of how well scores tell harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grid import grid

_FORMS = ("plain", "wrapped")
_TOLD = ("AUROC", "harmful", "harmless")


def gates(folder: Path, model: str, *chosen: str) -> Iterator[str]:
    """What each gate, or each of those chosen, opens for: kinds of requests down, gates across."""
    document = _document(folder, f"gates-{model}")
    yield (
        f"`python benchmarks/gates.py {model}`, {document['machine']['dtype']}; in brackets 95 % "
        "intervals, and for how many requests the model's own refusal opens it.\n"
    )
    rows = document["rows"]
    names = chosen or tuple(dict.fromkeys(row["gate"] for row in rows))
    shown: dict[str, dict[str, str]] = {}
    for row in rows:
        opened, kind = row["opened"], f"{row['kind']}, n = {row['opened']['n']}"
        low, high = (f"{100 * opened[side]:.1f}" for side in ("low", "high"))
        cell = f"{100 * opened['value']:.1f} % ({low}–{high}; {row['own']})"
        shown.setdefault(kind, {})[row["gate"]] = cell
    yield from grid(
        ["opened", *names],
        [(kind, *(cells[name] for name in names)) for kind, cells in shown.items()],
    )


def criteria(folder: Path, model: str) -> Iterator[str]:
    """How well each score tells harm: averaged over its layers, and at its best single layer."""
    document = _document(folder, f"criteria-{model}")
    by: dict[str, dict[str, Any]] = {}  # score → form → row
    for row in document["rows"]:
        by.setdefault(row["score"], {})[row["form"]] = row
    n = sorted({row[kind]["n"] for row in document["rows"] for kind in ("opened", "harmless")})
    yield (
        f"`python benchmarks/criteria.py {model}`, {document['machine']['dtype']}; AUROC, and how "
        "many of the harmful and of the harmless prompts score above the threshold, in per cent, "
        f"with 95 % intervals; n = {', '.join(map(str, n))} of each.\n"
    )
    single = [score for score in by if ", layer " in score]
    best: dict[str, str] = {}
    for score in sorted(single, key=lambda score: by[score]["plain"]["auroc"]):
        best[score.partition(",")[0]] = score
    titled = {score: score for score in by if score not in single}
    titled |= {f"best single layer: {score}": score for score in best.values()}
    yield from grid(
        ["score", *(f"{form}: {name}" for form in _FORMS for name in _TOLD)],
        [
            (title, *(cell for form in _FORMS for cell in _cells(by[score][form])))
            for title, score in titled.items()
        ],
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shares = [
        f"{100 * of['value']:.0f} ({100 * of['low']:.0f}–{100 * of['high']:.0f})"
        for of in (row["opened"], row["harmless"])
    ]
    return f"{row['auroc']:.3f}", *shares


def _document(folder: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / f"{name}.json").read_text("utf-8"))
    return read
