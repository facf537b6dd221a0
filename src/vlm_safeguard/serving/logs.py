"""Logs: a line of JSON for each event, of listed fields only, so that none holds a prompt."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

FIELDS = (
    *("endpoint", "status", "seconds", "images", "prompt_tokens", "completion_tokens"),
    *("gate", "criterion", "kind", "place", "reason", "policy"),
)

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonFormatter(logging.Formatter):
    """Writes what is listed in `FIELDS`, and no traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        facts = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "request_id": request_id.get(),
            **{name: getattr(record, name, None) for name in FIELDS},
        }
        return json.dumps({name: value for name, value in facts.items() if value is not None})


class Unfailing:
    """A stream that takes what it can: where a disk is full, what is written is lost, and no more.

    Attributes that it has not are the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As many characters as were given, written or not."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what waits, if it can be written."""
        with suppress(OSError):
            self._stream.flush()


def log_to_stderr() -> None:
    """Write what the server logs to standard error, which ends no process where it is full."""
    if not isinstance(sys.stderr, Unfailing):
        sys.stderr = Unfailing(sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("vlm_safeguard.serving")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def place_of(error: BaseException) -> str:
    """Where an error was raised, without a path."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
