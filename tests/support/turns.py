"""Of a full product of parameters, the part that `make test` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def in_turns(first: Mapping[str, Any], second: Sequence[Any]) -> list[Any]:
    """All pairs, by the names of the first.

    `make test` takes each of the first once and those of the second in turns; `make test-thorough`
    has the others.
    """
    return [
        pytest.param(
            value,
            other,
            id=f"{name}-{other}",
            marks=() if number % len(second) == place else pytest.mark.thorough,
        )
        for number, (name, value) in enumerate(first.items())
        for place, other in enumerate(second)
    ]
