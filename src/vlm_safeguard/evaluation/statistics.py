"""Rates, means and ratios with their uncertainty, and comparisons of paired outcomes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
_ENTRIES = 1 << 22  # of a resampling that are held at a time


@dataclass(frozen=True)
class Estimate:
    """A number measured on `n` answers, with the ends of its 95 % interval."""

    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Two yes/no outcomes of the same `n` prompts: how often one alone is yes, and its p value."""

    n: int
    only_a: int
    only_b: int
    p: float


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927), within 0–1.

    Raises:
        ValueError: n is 0, or successes are not within 0–n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a proportion")
    share = successes / n
    centre = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    # at the ends rounding can cross the share itself
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def share(outcomes: Sequence[bool]) -> Estimate:
    """How many of yes/no outcomes are yes, 0–1, with the Wilson interval.

    Raises:
        ValueError: there are none.
    """
    low, high = wilson(sum(outcomes), len(outcomes))
    return Estimate(len(outcomes), sum(outcomes) / len(outcomes), low, high)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """McNemar's test (1947) of whether two defences differ on the same prompts, exact, two-sided.

    Of the prompts on which they differ, each is as likely to be yes under a as under b if there is
    no difference: p = min(1, 2 · P[Binomial(only_a + only_b, ½) ≤ min(only_a, only_b)]).

    Raises:
        ValueError: the two are not of one length.
    """
    pairs = Counter((bool(x), bool(y)) for x, y in zip(a, b, strict=True))
    only_a, only_b = pairs[True, False], pairs[False, True]
    differ = only_a + only_b
    tail = sum(math.comb(differ, k) for k in range(min(only_a, only_b) + 1))
    return McNemar(len(a), only_a, only_b, p=float(min(Fraction(1), Fraction(2 * tail, 2**differ))))


def confusion(
    a: Sequence[Hashable], b: Sequence[Hashable], labels: Sequence[Hashable]
) -> list[list[int]]:
    """How often a gave the label of the row and b, of the same answer, that of the column.

    Raises:
        ValueError: a label that is not among `labels`, or not as many of one as of the other.
    """
    if unknown := {*a, *b} - {*labels}:
        raise ValueError(f"labels {unknown} are not among {list(labels)}")
    pairs = Counter(zip(a, b, strict=True))
    return [[pairs[row, column] for column in labels] for row in labels]


def cohens_kappa(table: Sequence[Sequence[int]]) -> float | None:
    """Cohen's κ (1960) of a confusion table: (observed − chance) / (1 − chance) agreement.

    None where chance alone agrees always: nothing was judged, or all alike by both.
    """
    n = sum(map(sum, table))
    if not n:
        return None
    rows = [sum(row) for row in table]
    columns = [sum(column) for column in zip(*table, strict=True)]
    agreed = Fraction(sum(table[i][i] for i in range(len(table))), n)
    chance = Fraction(sum(r * c for r, c in zip(rows, columns, strict=True)), n * n)
    return None if chance == 1 else float((agreed - chance) / (1 - chance))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of values, with its bootstrap interval.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    return bootstrap([values], lambda means: means[:, 0])


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Mean of `numerators` over mean of `denominators`, of the same prompts one by one.

    The paired bootstrap resamples prompts, so what two defences share in a prompt cancels.

    Raises:
        ValueError: not as many of one as of the other, none, one that is not finite, or a
            resample's denominators are all 0.
    """
    return bootstrap([numerators, denominators], lambda means: means[:, 0] / means[:, 1])


def bootstrap(
    columns: Sequence[Sequence[float]],
    statistic: Callable[[torch.Tensor], torch.Tensor],
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A function of means over answers, with its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        columns: what was measured of each answer; answers are resampled whole.
        statistic: (k, columns) float64 means → (k,) values.

    Raises:
        ValueError: no answers, columns of different lengths, or values that are not finite.
    """
    n = len(columns[0])
    if not n or any(len(column) != n for column in columns):
        raise ValueError(f"columns of {[len(column) for column in columns]} values")
    values = torch.tensor([list(map(float, column)) for column in columns], dtype=torch.float64).T
    source = torch.Generator().manual_seed(seed)
    at_once = max(1, _ENTRIES // (n * len(columns)))
    parts = []
    for start in range(0, draws, at_once):
        rows = torch.randint(n, (min(at_once, draws - start), n), generator=source)
        parts.append(statistic(values[rows].mean(1)))
    resampled, value = torch.cat(parts), statistic(values.mean(0, keepdim=True))
    if not (torch.isfinite(resampled).all() and torch.isfinite(value).all()):
        raise ValueError("a value, or the statistic of a resample, is not finite")
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(n, float(value), low, high)
