"""Descents from several starts, each kept once it is through; the best of them by the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.asks.attempt import AttackName, Attempt
from vlm_safeguard.evaluation.attacks.descent import Budget, Descent
from vlm_safeguard.timing import now

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
    from vlm_safeguard.evaluation.attacks.pixels import Pixels


class Made(BaseModel):
    """An adversarial image.

    Attributes:
        image: relative to the evaluation's folder.
        first: the loss that its descent began with.
        loss: its own.
        steps: gradients that were taken.
        seconds: a share of those that its batch took.
    """

    model_config = ConfigDict(frozen=True)

    image: str
    first: float
    loss: float
    steps: int
    seconds: float

    def attempt(self, attack: AttackName, epsilon: int, through: str) -> Attempt:
        """What a request is shown."""
        return Attempt(
            attack=attack,
            epsilon=epsilon,
            through=through,
            image=self.image,
            loss=(self.first, self.loss),
            steps=self.steps,
            seconds=self.seconds,
        )


class _Restart(BaseModel):
    """One restart on a batch: an image each."""

    images: list[Made]


#: Runs restart `number` on images of these numbers, to its end.
Run = Callable[[int, Sequence[int]], Descent]


def best_of(
    names: Sequence[str],
    run: Run,
    pixels: Pixels,
    budget: Budget,
    key: Sequence[Any],
    checkpoints: Checkpoints,
) -> list[Made]:
    """The best image of each name.

    Restarts go on with those alone whose loss is not low enough yet. What is given has the first
    restart's `first`, and the steps and seconds of all.

    Args:
        names: of the images.
        key: what they depend on, besides names, budget and restart.
    """
    best: dict[int, Made] = {}
    for number in range(budget.restarts):
        left = [n for n in range(len(names)) if n not in best or best[n].loss > -budget.confidence]
        if not left:
            break

        def make(number: int = number, left: Sequence[int] = left) -> _Restart:
            begun = now()
            descent = run(number, left)
            return _made(descent, pixels, now() - begun, checkpoints)

        place = [*key, *astuple(budget), number, [names[n] for n in left]]
        restart = checkpoints.kept(place, _Restart, make)
        for n, made in zip(left, restart.images, strict=True):
            best[n] = _better(best[n], made) if n in best else made
    return [best[n] for n in range(len(names))]


def _made(descent: Descent, pixels: Pixels, seconds: float, checkpoints: Checkpoints) -> _Restart:
    return _Restart(
        images=[
            Made(
                image=checkpoints.save(pixels.image(levels)),
                first=float(first),
                loss=float(loss),
                steps=int(steps),
                seconds=seconds / len(descent.best),
            )
            for levels, first, loss, steps in zip(
                descent.best, descent.first, descent.loss, descent.taken, strict=True
            )
        ]
    )


def _better(before: Made, after: Made) -> Made:
    """The one of the lower loss, with what both took."""
    better = after if after.loss < before.loss else before
    return better.model_copy(
        update={
            "first": before.first,
            "steps": before.steps + after.steps,
            "seconds": before.seconds + after.seconds,
        }
    )
