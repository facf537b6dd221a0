"""Defended over undefended, on the same requests: tokens, seconds, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.rows import BASELINE
from vlm_safeguard.evaluation.statistics import bootstrap

CostMetric = Literal["tokens", "seconds", "perplexity"]
COST_METRICS: tuple[CostMetric, ...] = get_args(CostMetric)
_DRAWS = 2000


class CostRatio(BaseModel):
    """A defence's measure over the unguarded model's, with a paired bootstrap's 95 % interval.

    Attributes:
        prompts: the kind of request.
        n: requests, each under all of its image conditions.
    """

    model_config = ConfigDict(frozen=True)

    defence: str
    prompts: Kind
    metric: CostMetric
    n: int
    value: float
    low: float
    high: float


def cost_ratios(lines: Sequence[Line]) -> list[CostRatio]:
    """Every defence over none, by kind of request, on what both answered.

    Tokens and seconds are ratios of sums; perplexity is exp(Σ nll / Σ tokens) of each, then the
    ratio. Whole requests are resampled, with the answers of both under every image condition, as
    those are not independent (seeded: the same every time).
    """
    unguarded = {line.place: line for line in lines if line.defence == BASELINE}
    sums: dict[tuple[str, Kind, CostMetric], dict[tuple[str, str], list[float]]] = {}
    for line in lines:
        other = unguarded.get(line.place)
        if line.defence == BASELINE or other is None:
            continue
        for metric in COST_METRICS:
            summands = _summands(line, other, metric)
            if summands is None:
                continue
            requests = sums.setdefault((line.defence, line.kind, metric), {})
            request = requests.setdefault((line.benchmark, line.sample), [0.0] * len(summands))
            for place, summand in enumerate(summands):
                request[place] += summand
    ratios = []
    for (defence, kind, metric), requests in sums.items():
        columns = list(zip(*requests.values(), strict=True))
        estimate = bootstrap(columns, _ratio, draws=_DRAWS)
        ratios.append(
            CostRatio(
                defence=defence,
                prompts=kind,
                metric=metric,
                n=estimate.n,
                value=estimate.value,
                low=estimate.low,
                high=estimate.high,
            )
        )
    return ratios


def _summands(line: Line, unguarded: Line, metric: CostMetric) -> tuple[float, ...] | None:
    """Defended and unguarded value; of perplexity (nll, tokens) of both; None if not measured."""
    if metric == "perplexity":
        if line.nll is None or unguarded.nll is None:
            return None
        if not line.nll_tokens or not unguarded.nll_tokens:
            return None
        return line.nll, line.nll_tokens, unguarded.nll, unguarded.nll_tokens
    above, below = getattr(line, metric), getattr(unguarded, metric)
    return (above, below) if above is not None and below else None


def _ratio(means: torch.Tensor) -> torch.Tensor:
    """(k, 2 or 4) means of summands → (k,) ratios."""
    if means.shape[1] == 2:
        return means[:, 0] / means[:, 1]
    return torch.exp(means[:, 0] / means[:, 1] - means[:, 2] / means[:, 3])
