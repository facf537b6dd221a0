"""One adversarial image for all requests: optimised on some of them, tried on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vlm_safeguard.evaluation.asks.attempt import AttackName, Attempt, with_image
from vlm_safeguard.evaluation.attacks.descent import Budget, Descent
from vlm_safeguard.evaluation.attacks.pixels import Pixels, only_image
from vlm_safeguard.evaluation.attacks.restarts import best_of

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.asks.ask import Ask
    from vlm_safeguard.evaluation.attack_plan import AttackPlan
    from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
    from vlm_safeguard.evaluation.attacks.target import Target


@dataclass(frozen=True)
class Universal:
    """Sign steps on the pixels of one image, down the mean loss over requests.

    A request counts no more once its loss is low enough, so that hard ones are worked on.

    Attributes:
        epsilon: levels by which a pixel may differ, 1–255.
        prompts: what it is optimised on: others than those that it is tried on.
    """

    epsilon: int
    prompts: tuple[Ask, ...]

    name: ClassVar[AttackName] = "universal"

    def __call__(
        self, target: Target, asks: Sequence[Ask], plan: AttackPlan, checkpoints: Checkpoints
    ) -> list[Attempt]:
        """See `Attack`. Every ask is shown the same image."""
        chats = [ask.chat() for ask in self.prompts]
        pixels = Pixels.of(target.vlm.processor, only_image(chats[0]))
        start = pixels.levels_of(only_image(chats[0]))[None]
        shown = [with_image(chat, pixels.image(start[0])) for chat in chats]
        budget = Budget.of(plan, self.epsilon)

        def run(number: int, rows: Sequence[int]) -> Descent:
            random = torch.Generator().manual_seed(plan.seed + number) if number else None
            descent = Descent(start, budget, random)
            what = f"universal, ε = {self.epsilon}, through {target.name}, restart {number + 1}"
            with target.passes(shown, pixels) as passes:

                def mean_loss(levels: torch.Tensor) -> torch.Tensor:
                    losses = target.losses(passes.logits(levels.expand(len(shown), -1)))
                    return losses.clamp(min=-budget.confidence).mean()[None]

                while len(active := descent.active):
                    descent.step(active, mean_loss)
                    checkpoints.report(what, descent.done, budget.steps)
            return descent

        key = [self.name, target.name, plan.benchmark, self.prompts[0].condition, plan.seed]
        names = [" ".join(ask.sample.id for ask in self.prompts)]
        (made,) = best_of(names, run, pixels, budget, key, checkpoints)
        return [made.attempt(self.name, self.epsilon, target.name)] * len(asks)
