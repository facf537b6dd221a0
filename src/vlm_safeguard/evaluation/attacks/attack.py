"""What every attack is: requests in, attempts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.asks.ask import Ask
    from vlm_safeguard.evaluation.asks.attempt import AttackName, Attempt
    from vlm_safeguard.evaluation.attack_plan import AttackPlan
    from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
    from vlm_safeguard.evaluation.attacks.target import Target


class Attack(Protocol):
    """A way of asking so that a model answers what it would refuse."""

    @property
    def name(self) -> AttackName:
        """What plans and tables call it."""

    def __call__(
        self, target: Target, asks: Sequence[Ask], plan: AttackPlan, checkpoints: Checkpoints
    ) -> list[Attempt]:
        """One attempt for each ask.

        Args:
            target: a model with a defence at work.
            asks: under one image condition, whose image the attack starts from.
            plan: the budget and the seed.
            checkpoints: where what is made is kept, and from where a run goes on.

        Raises:
            SafeguardError: the model or an image cannot be attacked so.
        """
