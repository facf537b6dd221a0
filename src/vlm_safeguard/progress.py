"""How far a fit has come: a bar; where the output is no terminal, now and then a line."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

_NOW_AND_THEN = 20.0  # seconds


def bar(total: int, label: str, unit: str) -> Any:
    """A bar of so many units, to be opened and updated; nothing where that takes no time."""
    every = 0.0 if sys.stderr.isatty() else _NOW_AND_THEN
    return tqdm(total=total, desc=label, unit=unit, delay=every, mininterval=max(every, 0.1))
