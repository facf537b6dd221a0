"""Defended over undefended, on the same requests: tokens, seconds, perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_safeguard.report.names import BASELINE
from vlm_safeguard.report.source import Line

_ROUNDS = 1000
_CHUNK = 50  # rounds at once: bounds memory
RATIOS = ("tokens", "seconds", "perplexity")


@dataclass(frozen=True)
class Ratio:
    """A defence's mean over the unguarded model's, with a paired bootstrap's 95 % interval.

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
        Ratio(*names, len(requests), *_bootstrap(torch.tensor(list(requests.values()))))
        for names, requests in found.items()
    ]


def _summands(mine: Line, its: Line, metric: str) -> tuple[float, ...] | None:
    """(mine, its), or (my nll, my tokens, its nll, its tokens); None where not measured."""
    if metric == "perplexity":
        if mine.nll is None or its.nll is None or not mine.nll_tokens or not its.nll_tokens:
            return None
        return mine.nll, mine.nll_tokens, its.nll, its.nll_tokens
    a, b = getattr(mine, metric), getattr(its, metric)
    return (a, b) if a is not None and b else None


def _bootstrap(table: torch.Tensor) -> tuple[float, float, float]:
    """(ratio, low, high) of (n, 2 or 4) summands."""
    table = table.double()
    n = len(table)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([
        table[torch.randint(n, (_CHUNK, n), generator=generator)].sum(1)
        for _ in range(_ROUNDS // _CHUNK)
    ])  # fmt: skip
    low, high = torch.quantile(_ratio(drawn), torch.tensor([0.025, 0.975]).double()).tolist()
    return float(_ratio(table.sum(0))), low, high


def _ratio(sums: torch.Tensor) -> torch.Tensor:
    if sums.shape[-1] == 2:
        return sums[..., 0] / sums[..., 1]
    return torch.exp(sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3])
