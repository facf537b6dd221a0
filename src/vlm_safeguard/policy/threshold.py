"""Where a criterion's threshold goes: calibrated on harmless requests to a budget."""

from __future__ import annotations

import math

import torch


def threshold_for(harmless: torch.Tensor, budget: float) -> float:
    """The lowest threshold that keeps false positives within `budget`, by split conformal rank.

    A new harmless request, exchangeable with the calibration ones, scores above it with
    probability at most `budget`: it is the k-th largest score, k = ⌊budget · (n + 1)⌋.

    Args:
        harmless: (n,) scores of held-out harmless requests.

    Raises:
        ValueError: too few requests for the budget to mean anything (k = 0).
    """
    k = math.floor(budget * (len(harmless) + 1))
    if k < 1:
        raise ValueError(
            f"a false-positive budget of {budget:.2%} needs at least "
            f"{math.ceil(1 / budget) - 1} harmless requests; there are {len(harmless)}"
        )
    return float(harmless.sort(descending=True).values[k - 1])
