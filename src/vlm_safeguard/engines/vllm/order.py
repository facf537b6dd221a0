"""When a request with media is given to the engine: after its verdict, or beside its questions."""

from __future__ import annotations

from enum import StrEnum


class Order(StrEnum):
    """When a request with media is given to the engine."""

    AUTO = "auto"  # together where the engine is idle, else first; edits are always first
    FIRST = "first"  # after its verdict, if its gate is closed
    TOGETHER = "together"  # at once; its output is withheld, and it is aborted if the gate opens
