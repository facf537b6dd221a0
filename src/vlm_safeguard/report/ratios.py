"""Defended over undefended, on the same requests: tokens, seconds, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_safeguard.evaluation.statistics import bootstrap
from vlm_safeguard.report.names import BASELINE
from vlm_safeguard.report.source import Line

_DRAWS = 2000
RATIOS = ("tokens", "seconds", "perplexity")


@dataclass(frozen=True)
class Ratio:
    """A defence's measure over the unguarded model's, with a paired bootstrap's 95 % interval.

    Attributes:
        n: requests, each under all of its image conditions.
    """

    defence: str
    prompts: str
    metric: str
    n: int
    value: float
    low: float
    high: float


def paired_ratios(lines: Sequence[Line]) -> list[Ratio]:
    """Every defence over none, by kind of request, on what both answered.

    Tokens and seconds are ratios of sums; perplexity is exp(Σ nll / Σ tokens) of each, then the
    ratio. Whole requests are resampled, with the answers of both under every image condition, as
    those are not independent (seeded: the same every time).
    """
    plain = {(x.benchmark, x.sample, x.condition): x for x in lines if x.defence == BASELINE}
    found: dict[tuple[str, str, str], dict[tuple[str, str], list[float]]] = {}
    for line in lines:
        other = plain.get((line.benchmark, line.sample, line.condition))
        if line.defence == BASELINE or other is None:
            continue
        for metric in RATIOS:
            summands = _summands(line, other, metric)
            if summands is not None:
                requests = found.setdefault((line.defence, line.kind, metric), {})
                sums = requests.setdefault((line.benchmark, line.sample), [0.0] * len(summands))
                requests[line.benchmark, line.sample] = [
                    a + b for a, b in zip(sums, summands, strict=True)
                ]
    return [
        Ratio(*names, of.n, of.value, of.low, of.high)
        for names, requests in found.items()
        for of in [bootstrap(list(zip(*requests.values(), strict=True)), _statistic, draws=_DRAWS)]
    ]


def _summands(mine: Line, its: Line, metric: str) -> tuple[float, ...] | None:
    """(mine, its), or (my nll, my tokens, its nll, its tokens); None where not measured."""
    if metric == "perplexity":
        if mine.nll is None or its.nll is None or not mine.nll_tokens or not its.nll_tokens:
            return None
        return mine.nll, mine.nll_tokens, its.nll, its.nll_tokens
    a, b = getattr(mine, metric), getattr(its, metric)
    return (a, b) if a is not None and b else None


def _statistic(means: torch.Tensor) -> torch.Tensor:
    """(k, 2 or 4) means of summands → (k,) ratios."""
    if means.shape[1] == 2:
        return means[:, 0] / means[:, 1]
    return torch.exp(means[:, 0] / means[:, 1] - means[:, 2] / means[:, 3])
