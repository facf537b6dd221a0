"""The tables of what gates open for, from the files of `benchmarks/gates.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from grid import grid


def gates(folder: Path, model: str, *chosen: str) -> Iterator[str]:
    """What each gate, or each of those chosen, opens for: kinds of requests down, gates across."""
    document = json.loads((folder / f"gates-{model}.json").read_text("utf-8"))
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
