"""A file of results, each on the disk before it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

Result = TypeVar("Result", bound=BaseModel)


class Journal:
    """Plain JSON objects by key; what is added at once is on one line, whole or not at all.

    So a run that goes on after a crash makes the very batches that were left.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that was cut off is dropped."""
        self.path = path
        self._results: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.is_file():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._results.update(json.loads(line))
                    whole += len(line)
            os.truncate(path, whole)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result kept under a key."""
        return self._results.get(key)

    def add(self, results: dict[str, dict[str, Any]]) -> None:
        """Keep what was made at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(results).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._results.update(results)

    def kept(self, key: Sequence[Any], kind: type[Result], make: Callable[[], Result]) -> Result:
        """The result kept under a key, or one that is made now and kept."""
        name = json.dumps(key)
        if (known := self.get(name)) is not None:
            return kind.model_validate(known)
        result = make()
        self.add({name: result.model_dump(mode="json")})
        return result
