"""Projected sign descent on images' levels (PGD, Madry et al., arXiv 1706.06083).

Levels and steps are whole numbers of 1/255, so every image on the way is one that a file can hold,
and its loss is the loss of that file. The best one on the way is kept, not the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from vlm_safeguard.evaluation.attacks.pixels import LEVELS

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.attack_plan import AttackPlan

#: (images, count) levels → (images,) losses, each of its own image alone.
Losses = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Budget:
    """What a descent may do.

    Attributes:
        epsilon: levels by which a pixel may differ from the start; 255 for any valid one.
        steps: of each restart.
        step: levels of the first step; later ones are shorter, down to 1.
        confidence: loss below zero at which an image is left as it is (the κ of Carlini and
            Wagner, arXiv 1608.04644).
        restarts: from how many starts: the image as it is, then random ones within ε.
    """

    epsilon: int
    steps: int
    step: int
    confidence: float
    restarts: int = 1

    @classmethod
    def of(cls, plan: AttackPlan, epsilon: int) -> Self:
        """A plan's, at one ε."""
        return cls(epsilon, plan.steps, plan.step, plan.confidence, plan.restarts)

    def length(self, step: int) -> int:
        """Levels of a step, which shrink in a line; at most a quarter of ε."""
        longest = min(self.step, max(self.epsilon // 4, 1))
        return max(round(longest * (1 - step / self.steps)), 1)


class Descent:
    """One restart on a batch of images.

    Attributes:
        start: (images, count) whole levels that ε is counted from.
        levels: the current ones.
        best: those of the least loss so far.
        loss: (images,) that loss.
        first: (images,) the loss that it began with.
        taken: (images,) gradients that were taken.
        done: steps so far.
    """

    def __init__(
        self, start: torch.Tensor, budget: Budget, random: torch.Generator | None = None
    ) -> None:
        """Begin at `start`, or at random within ε of it."""
        self.start, self.budget = start, budget
        self._low = (start - budget.epsilon).clamp(min=0)
        self._high = (start + budget.epsilon).clamp(max=LEVELS - 1)
        self.levels = start
        if random is not None:
            spread = torch.rand(start.shape, generator=random, dtype=torch.float64)
            drawn = self._low + (spread * (self._high - self._low + 1)).floor()
            self.levels = drawn.to(start.dtype)
        self.best = self.levels
        self.loss = torch.full((len(start),), torch.inf, dtype=torch.float64)
        self.first = self.loss
        self.taken = torch.zeros(len(start), dtype=torch.long)
        self.done = 0

    @property
    def active(self) -> torch.Tensor:
        """Numbers of the images that are still to be changed."""
        if self.done > self.budget.steps:
            return torch.zeros(0, dtype=torch.long)
        return (self.loss > -self.budget.confidence).nonzero()[:, 0]

    def step(self, images: torch.Tensor, losses: Losses) -> None:
        """Take the loss of some images, and a step down its gradient, but after the last one.

        Args:
            images: their numbers.
            losses: of these.
        """
        last = self.done == self.budget.steps
        levels = self.levels[images].clone().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            values = losses(levels)
        found = values.detach().double().cpu()
        better = images[found < self.loss[images]]
        self.best = self.best.index_copy(0, better, self.levels[better])
        self.loss = self.loss.index_copy(0, images, torch.minimum(self.loss[images], found))
        if self.done == 0:
            self.first = self.first.index_copy(0, images, found)
        if not last:
            (gradient,) = torch.autograd.grad(values.sum(), levels)
            moved = levels.detach() - self.budget.length(self.done) * gradient.sign()
            moved = torch.maximum(torch.minimum(moved, self._high[images]), self._low[images])
            self.levels = self.levels.index_copy(0, images, moved)
            self.taken[images] += 1
        self.done += 1
