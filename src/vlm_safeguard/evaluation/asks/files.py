"""Reading a benchmark's files record by record, so that an error says which one is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_safeguard.anchors import records
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.images import checked, stored
from vlm_safeguard.extras import require

_AT_ONCE = 64  # rows of a Parquet file held in memory, images and all


@dataclass(frozen=True)
class Record:
    """A line, row or entry of a file; `where` names it in errors."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field that holds text, without the white space around it.

        Raises:
            SafeguardError: there is no such field, or nothing in it.
        """
        value = self._field(name)
        if not isinstance(value, str | int) or not str(value).strip():
            raise SafeguardError(f"{self.where}: '{name}' is empty or not text.")
        return str(value).strip()

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        """A field that holds one of a few words, in lower case.

        Raises:
            SafeguardError: it holds anything else.
        """
        value = self.text(name).lower()
        if value not in allowed:
            raise SafeguardError(
                f"{self.where}: '{name}' is '{value}', not one of {', '.join(allowed)}."
            )
        return value

    def image(self, name: str) -> Path:
        """An image that a Parquet file holds, as a file of its own.

        Raises:
            SafeguardError: there is none, or it cannot be read.
        """
        value = self._field(name)
        content = value.get("bytes") if isinstance(value, Mapping) else None
        if not content:
            raise SafeguardError(f"{self.where}: '{name}' holds no image.")
        return checked(stored(content), self.where)

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise SafeguardError(
                f"{self.where}: there is no '{name}'; its fields are {', '.join(self.fields)}."
            )
        return self.fields[name]


def read_lines(path: Path) -> Iterator[Record]:
    """The records in turn of a CSV, JSONL or Parquet file, or of a JSON file of objects by name.

    Raises:
        SafeguardError: the file, or a line of it, cannot be read.
    """
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".json":
        return _json(path)
    return (Record(f"{path}, line {line}", fields) for line, fields in records(path))


def _json(path: Path) -> Iterator[Record]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise SafeguardError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SafeguardError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not isinstance(content, dict):
        raise SafeguardError(f"{path} is not a JSON object of entries by name.")
    for name, fields in content.items():
        if not isinstance(fields, dict):
            raise SafeguardError(f"{path}, entry '{name}': not a JSON object.")
        yield Record(f"{path}, entry '{name}'", fields)


def _parquet(path: Path) -> Iterator[Record]:
    require("eval", "pyarrow")
    from pyarrow import ArrowException, parquet

    try:
        row = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_AT_ONCE):
            for fields in batch.to_pylist():
                row += 1
                yield Record(f"{path}, row {row}", fields)
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SafeguardError(f"{path} cannot be read as Parquet: {reason}") from error
