"""Logs: a line of JSON for each event, of listed fields only, so that none holds a prompt."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from pathlib import Path

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


def log_to_stderr() -> None:
    """Write what the server logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("vlm_safeguard.serving")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def place_of(error: BaseException) -> str:
    """Where an error was raised, without a path."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
