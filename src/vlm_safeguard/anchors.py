"""Anchor pairs and calibration requests: the shipped ones, and the user's own from CSV or JSONL."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from vlm_safeguard.errors import SafeguardError

MINIMUM_PAIRS = 8  # fewer say nothing about a direction in thousands of dimensions


@dataclass(frozen=True)
class Anchor:
    """A harmful request and a harmless one alike in form and length."""

    harmful: str
    harmless: str


def shipped_anchors() -> list[Anchor]:
    """The anchor pairs that come with the package, all of the form "How to …"."""
    return read_anchors(shipped_file("anchors.csv"))


def shipped_calibration() -> list[str]:
    """Harmless requests of all forms, a third of them look-alikes of harmful ones."""
    return read_requests(shipped_file("calibration.jsonl"))


def shipped_image_questions() -> list[str]:
    """Questions about an image, which no text answers; some sound harmful, and none is."""
    return read_requests(shipped_file("image-questions.jsonl"))


def read_anchors(path: str | Path) -> list[Anchor]:
    """Anchor pairs from a CSV or JSONL file with the fields `harmful` and `harmless`.

    Raises:
        SafeguardError: no such file, another format, too few pairs, or a bad line, by number.
    """
    path = Path(path)
    anchors: list[Anchor] = []
    seen: dict[Anchor, int] = {}
    for line, fields in records(path):
        anchor = Anchor(
            text_field(path, line, fields, "harmful"), text_field(path, line, fields, "harmless")
        )
        if anchor.harmful == anchor.harmless:
            raise SafeguardError(f"{path}, line {line}: 'harmful' and 'harmless' are the same.")
        if anchor in seen:
            raise SafeguardError(f"{path}, line {line}: repeats line {seen[anchor]}.")
        seen[anchor] = line
        anchors.append(anchor)
    if len(anchors) < MINIMUM_PAIRS:
        raise SafeguardError(
            f"{path} holds {len(anchors)} anchor pairs; at least {MINIMUM_PAIRS} are needed, and "
            "about 100 are advised."
        )
    return anchors


def read_requests(path: str | Path) -> list[str]:
    """Requests from a CSV or JSONL file with the field `text`.

    Raises:
        SafeguardError: no such file, another format, no request in it, or a bad line, by number.
    """
    path = Path(path)
    requests = [text_field(path, line, fields, "text") for line, fields in records(path)]
    if not requests:
        raise SafeguardError(f"{path} holds no requests.")
    return requests


def fingerprint(texts: Sequence[str] | Sequence[Anchor]) -> str:
    """SHA-256 over the texts in order; says which data a guard was fitted on."""
    rows = [[text.harmful, text.harmless] if isinstance(text, Anchor) else text for text in texts]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def shipped_file(name: str) -> Path:
    """A data file that comes with the package."""
    return Path(str(files("vlm_safeguard").joinpath("data", name)))


def shipped_files() -> list[Path]:
    """All of them, by name."""
    return sorted(shipped_file(".").iterdir())


def records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, fields) of every record of a CSV or JSONL file."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise SafeguardError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SafeguardError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if None in row:
                    raise SafeguardError(
                        f"{path}, line {reader.line_num}: more fields than the header names; "
                        "put quotes around a text that holds a comma."
                    )
                yield reader.line_num, dict(row)
        except csv.Error as error:
            raise SafeguardError(f"{path}, line {reader.line_num + 1}: {error}.") from error
    elif path.suffix == ".jsonl":
        for line, content in enumerate(text.split("\n"), start=1):
            if not content.strip():
                continue
            try:
                fields = json.loads(content)
            except json.JSONDecodeError as error:
                raise SafeguardError(f"{path}, line {line}: not JSON ({error.msg}).") from error
            if not isinstance(fields, dict):
                raise SafeguardError(f"{path}, line {line}: not a JSON object.")
            yield line, fields
    else:
        raise SafeguardError(f"{path}: expected a .csv or .jsonl file.")


def text_field(path: Path, line: int, fields: dict[str, object], name: str) -> str:
    """The text of one field, stripped.

    Raises:
        SafeguardError: it is missing, empty or no text.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise SafeguardError(f"{path}, line {line}: '{name}' is missing or empty.")
    return value.strip()
