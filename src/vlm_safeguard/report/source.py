"""What a report is made from: the folder that an evaluation wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges.agreement import Agreement
from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.probes.gap import GapRecord
from vlm_safeguard.evaluation.results.rows import Results
from vlm_safeguard.guard import Guard

Model = TypeVar("Model", bound=BaseModel)


class Line(BaseModel):
    """One line of `samples.jsonl`: one answer."""

    benchmark: str
    sample: str
    kind: Literal["harmful", "harmless", "utility"]
    category: str = ""
    condition: str
    defence: str
    request: str
    image: str | None = None
    answer: str
    tokens: int | None = None
    seconds: float | None = None
    receipt: dict[str, Any] | None = None
    verdicts: dict[str, Verdict] = {}
    correct: bool | None = None
    nll: float | None = None
    nll_tokens: int | None = None


class Comparison(BaseModel):
    """McNemar's test of two defences on the same prompts."""

    benchmark: str | None = None
    condition: str
    metric: str
    judge: str | None = None
    a: str
    b: str
    n: int
    only_a: int
    only_b: int
    p: float


class Share(BaseModel):
    """A share, 0–1, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class Setting(BaseModel):
    """One point of the frontier: a knob's setting, and what it leads to."""

    knob: str
    setting: float
    condition: str
    attack_success: Share
    over_refusal: Share


class Details(BaseModel):
    """What the report reads of `results.json`'s details."""

    mcnemar: list[Comparison] = []
    agreement: list[Agreement] = []
    frontier: list[Setting] = []
    provenance: dict[str, Any] = {}
    closed_gate_rows: int | None = None
    closed_gate_rows_identical: int = 0


@dataclass(frozen=True)
class Source:
    """An evaluation's output.

    Attributes:
        details: of the results, checked.
        lines: of `samples.jsonl`, in its order.
        missing: files that the folder does not have; the report says what it lacks for that.
    """

    folder: Path
    results: Results
    details: Details
    lines: list[Line]
    guard: Guard | None
    gap: GapRecord | None
    missing: tuple[str, ...]


def read_source(folder: Path) -> Source:
    """Read an evaluation's folder; only `results.json` has to be there.

    Raises:
        SafeguardError: no results, or a file that is there and cannot be read.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise SafeguardError(
            f"{folder} holds no results.json; give the folder that `vlm-safeguard eval` or "
            "`vlm-safeguard demo` wrote."
        )
    results = _parsed(Results, path)
    if results.format != 1:
        raise SafeguardError(f"{path} has format {results.format}; this version reads 1.")
    if not results.rows:
        raise SafeguardError(f"{path} has no rows: nothing was measured.")
    there = {name: (folder / name).exists() for name in ("samples.jsonl", "guard", "gap.json")}
    return Source(
        folder=folder,
        results=results,
        details=_details(results, path),
        lines=_lines(folder / "samples.jsonl") if there["samples.jsonl"] else [],
        guard=Guard.from_pretrained(folder / "guard") if there["guard"] else None,
        gap=_parsed(GapRecord, folder / "gap.json") if there["gap.json"] else None,
        missing=tuple(name for name, present in there.items() if not present),
    )


def _parsed(model: type[Model], path: Path) -> Model:
    try:
        return model.model_validate_json(path.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise SafeguardError(f"{path} cannot be read: {_first(error)}") from error


def _details(results: Results, path: Path) -> Details:
    try:
        return Details.model_validate(results.details)
    except ValidationError as error:
        raise SafeguardError(f"{path} cannot be read: details.{_first(error)}") from error


def _lines(path: Path) -> list[Line]:
    lines = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    try:
                        lines.append(Line.model_validate_json(text))
                    except ValidationError as error:
                        raise SafeguardError(
                            f"{path}, line {number}, cannot be read: {_first(error)}"
                        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SafeguardError(f"{path} cannot be read: {error}") from error
    return lines


def _first(error: Exception) -> str:
    """The gist of a long message."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    return str(error)
