"""How much longer one thing takes than another, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Ratio:
    """Median and range of a ratio over interleaved pairs of runs."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f}× (range {self.low:.2f}–{self.high:.2f}, {self.pairs} pairs)"


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, everything it started on a GPU included."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def time_ratio(plain: Callable[[], float], other: Callable[[], float], pairs: int = 5) -> Ratio:
    """Seconds that `other` measures over those of `plain`, run in turns, the order alternating.

    Both are called once before, to warm up.
    """
    plain()
    other()
    ratios = []
    for number in range(pairs):
        if number % 2:
            above = other()
            ratios.append(above / plain())
        else:
            below = plain()
            ratios.append(other() / below)
    return Ratio(median(ratios), min(ratios), max(ratios), pairs)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
