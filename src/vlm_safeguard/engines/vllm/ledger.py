"""Receipts of the requests that one HTTP request makes of the engine, in their order."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.receipt_object import receipt_object


@dataclass
class Place:
    """Of one request; its receipt is None until its gate has decided."""

    policy: Policy
    receipt: Receipt | None = None


@dataclass
class Ledger:
    """The places of all requests so far."""

    places: list[Place] = field(default_factory=list)

    @property
    def receipts(self) -> list[Receipt]:
        """Of those that are decided."""
        return [place.receipt for place in self.places if place.receipt is not None]

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The same as clients see them."""
        return [receipt_object(p.receipt, p.policy) for p in self.places if p.receipt is not None]


#: Of the HTTP request that is served; None outside of one.
ledger: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


def note(policy: Policy) -> Place:
    """A place for a request that comes now."""
    place, current = Place(policy), ledger.get()
    if current is not None:
        current.places.append(place)
    return place
