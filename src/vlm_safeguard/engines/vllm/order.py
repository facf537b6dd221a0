"""When a request with media is given to the engine: after its verdict, or beside it."""

from __future__ import annotations

from enum import StrEnum


class Order(StrEnum):
    """When a request with media is given to the engine."""

    FIRST = "first"  # after its verdict, if its gate is closed
    TOGETHER = "together"  # at once; its output is withheld, and it is aborted if the gate opens
