"""PGD: one adversarial image for each request, white box, through the defence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vlm_safeguard.evaluation.asks.attempt import AttackName, Attempt, with_image
from vlm_safeguard.evaluation.attacks.descent import Budget, Descent
from vlm_safeguard.evaluation.attacks.pixels import Pixels, only_image
from vlm_safeguard.evaluation.attacks.restarts import Made, best_of

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.asks.ask import Ask
    from vlm_safeguard.evaluation.attack_plan import AttackPlan
    from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
    from vlm_safeguard.evaluation.attacks.target import Target


@dataclass(frozen=True)
class PGD:
    """Sign steps on the pixels, from several starts.

    Attributes:
        epsilon: levels by which a pixel may differ, 1–255.
    """

    epsilon: int

    name: ClassVar[AttackName] = "pgd"

    def __call__(
        self, target: Target, asks: Sequence[Ask], plan: AttackPlan, checkpoints: Checkpoints
    ) -> list[Attempt]:
        """See `Attack`."""
        # near in length, near in the order: what shares a batch is then padded little
        order = sorted(
            range(len(asks)), key=lambda n: (len(asks[n].sample.text), asks[n].sample.id)
        )
        attempts: dict[int, Attempt] = {}
        for start in range(0, len(order), plan.batch_size):
            batch = order[start : start + plan.batch_size]
            images = self._images(target, [asks[n] for n in batch], plan, checkpoints)
            for n, made in zip(batch, images, strict=True):
                attempts[n] = made.attempt(self.name, self.epsilon, target.name)
        return [attempts[n] for n in range(len(asks))]

    def _images(
        self, target: Target, asks: Sequence[Ask], plan: AttackPlan, checkpoints: Checkpoints
    ) -> list[Made]:
        """The best image for each of one batch."""
        chats = [ask.chat() for ask in asks]
        pixels = Pixels.of(target.vlm.processor, only_image(chats[0]))
        start = torch.stack([pixels.levels_of(only_image(chat)) for chat in chats])
        shown = [
            with_image(chat, pixels.image(levels))
            for chat, levels in zip(chats, start, strict=True)
        ]
        budget = Budget.of(plan, self.epsilon)

        def run(number: int, rows: Sequence[int]) -> Descent:
            random = torch.Generator().manual_seed(plan.seed + number) if number else None
            descent = Descent(start[list(rows)], budget, random)
            what = f"PGD, ε = {self.epsilon}, through {target.name}, restart {number + 1}"
            while len(active := descent.active):
                batch = [shown[rows[n]] for n in active.tolist()]
                with target.passes(batch, pixels) as passes:
                    while len(descent.active) > len(active) / 2:  # else in a smaller batch
                        descent.step(active, lambda levels: target.losses(passes.logits(levels)))
                        checkpoints.report(what, descent.done, budget.steps)
            return descent

        key = [self.name, target.name, plan.benchmark, asks[0].condition, plan.seed]
        return best_of([ask.sample.id for ask in asks], run, pixels, budget, key, checkpoints)
