"""How much longer one thing takes than another, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel

    from vlm_safeguard.guard import Guard

TIMED_TOKENS = 16  # new tokens of a timed answer
T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """A ratio over interleaved pairs of runs.

    Attributes:
        middle: first and third quartile; half of the pairs lie between them.
    """

    median: float
    low: float
    high: float
    pairs: int
    middle: tuple[float, float]

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Of what was measured in the same rounds, one pair a round."""
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios), len(ratios), middle_half(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}× (range {self.low:.2f}–{self.high:.2f}, {self.pairs} pairs)"


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, method="inclusive")
    return first, third


def now() -> float:
    """Seconds on a clock, read once everything that was started on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, everything it started on a GPU included."""
    start = now()
    run()
    return now() - start


def interleave(runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each run gives, by name, a value a round; every second round goes backwards.

    All are called once before, to warm up. A machine that slows down for a while then slows
    neighbours, and what drifts steadily falls on both sides.
    """
    for run in runs.values():
        run()
    found: dict[str, list[T]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            found[name].append(runs[name]())
    return found


def time_ratio(plain: Callable[[], float], other: Callable[[], float], pairs: int = 5) -> Ratio:
    """Seconds that `other` measures over those of `plain`, run in turns, the order alternating.

    Both are called once before, to warm up.
    """
    found = interleave({"plain": plain, "other": other}, pairs)
    return Ratio.of(found["other"], found["plain"])


def generation_ratio(model: PreTrainedModel, inputs: BatchFeature, guard: Guard) -> Ratio:
    """Guarded over unguarded seconds of a greedy answer to a batch, attaching not counted."""

    def plain() -> float:
        return seconds(
            lambda: model.generate(
                **inputs, max_new_tokens=TIMED_TOKENS, min_new_tokens=TIMED_TOKENS, do_sample=False
            )
        )

    def guarded() -> float:
        with guard.attach(model):
            return plain()

    return time_ratio(plain, guarded)
