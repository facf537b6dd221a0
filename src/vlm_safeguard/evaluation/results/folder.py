"""An evaluation's folder: `results.json`, `samples.jsonl`, `gap.json` and `guard/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.results.counting import closed_gates
from vlm_safeguard.evaluation.results.gap import GapRecord
from vlm_safeguard.evaluation.results.lines import Line, read_lines, write_lines
from vlm_safeguard.evaluation.results.ratios import cost_ratios
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.validation import first_error
from vlm_safeguard.guard import Guard

RESULTS, SAMPLES, GAP, GUARD = "results.json", "samples.jsonl", "gap.json", "guard"
ATTACKED = "attacked.jsonl"
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Evaluation:
    """What a folder holds.

    Attributes:
        lines: of `samples.jsonl`, in its order.
        missing: files that the folder does not have.
    """

    results: Results
    lines: list[Line]
    guard: Guard | None
    gap: GapRecord | None
    missing: tuple[str, ...]


def read_evaluation(folder: Path) -> Evaluation:
    """Read a folder; only `results.json` has to be in it.

    What an earlier version did not count is counted from the lines, where they are.

    Raises:
        SafeguardError: no results, or a file that is there and cannot be read.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise SafeguardError(
            f"{folder} holds no {RESULTS}; give the folder that `vlm-safeguard eval` or "
            "`vlm-safeguard demo` wrote."
        )
    results = _parsed(Results, path)
    if not (results.rows or results.attacks):
        raise SafeguardError(f"{path} has no rows: nothing was measured.")
    missing = tuple(name for name in (SAMPLES, GUARD, GAP) if not (folder / name).exists())
    lines = [] if SAMPLES in missing else read_lines(folder / SAMPLES)
    return Evaluation(
        results=_completed(results, lines),
        lines=lines,
        guard=None if GUARD in missing else Guard.from_pretrained(folder / GUARD),
        gap=None if GAP in missing else _parsed(GapRecord, folder / GAP),
        missing=missing,
    )


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json`."""
    (folder / RESULTS).write_text(results.model_dump_json(indent=1) + "\n", "utf-8")


def write_samples(folder: Path, lines: Sequence[Line]) -> None:
    """Write `samples.jsonl`."""
    write_lines(folder / SAMPLES, lines)


def write_attacked(folder: Path, lines: Sequence[Line]) -> None:
    """Write `attacked.jsonl`."""
    write_lines(folder / ATTACKED, lines)


def write_gap(folder: Path, gap: GapRecord) -> None:
    """Write `gap.json`."""
    (folder / GAP).write_text(gap.model_dump_json() + "\n", "utf-8")


def _completed(results: Results, lines: Sequence[Line]) -> Results:
    counted: dict[str, object] = {}
    if lines and not results.cost_ratios:
        counted["cost_ratios"] = cost_ratios(lines)
    if lines and not results.closed_gates.answers:
        counted["closed_gates"] = closed_gates(lines)
    return results.model_copy(update=counted)


def _parsed(model: type[Model], path: Path) -> Model:
    try:
        return model.model_validate_json(path.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise SafeguardError(f"{path} cannot be read: {first_error(error)}") from error
