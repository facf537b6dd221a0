"""The frontier: how attack success trades against over-refusal as a guard's settings move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.results.counting import outcome
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.rows import Metric
from vlm_safeguard.evaluation.statistics import Estimate, share
from vlm_safeguard.policy.gate import ImageScore, TextScore

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard


class Setting(BaseModel):
    """One point of the frontier: a knob's setting, and what it leads to under an image condition.

    Attributes:
        knob: strength or threshold.
        attack_success: of harmful requests.
        over_refusal: of harmless requests.
    """

    model_config = ConfigDict(frozen=True)

    knob: str
    setting: float
    condition: str
    attack_success: Estimate
    over_refusal: Estimate


@dataclass(frozen=True)
class Sweep:
    """The answers at one point of the frontier."""

    knob: str
    setting: float
    condition: str
    lines: list[Line]


def frontier(points: Sequence[Sweep], judges: Sequence[str]) -> list[Setting]:
    """Attack success and over-refusal of every point, each by one judge all along the frontier.

    A judge of harm comes before `refusal` for attacks, and after it for refusals.

    Raises:
        SafeguardError: no judge could be read on every point.
    """
    if not points:
        return []
    by_harm = sorted(judges, key=lambda judge: judge == "refusal")
    attacks = _shares(points, "harmful", "attack_success", by_harm)
    refusals = _shares(points, "harmless", "refusal", by_harm[::-1])
    return [
        Setting(
            knob=point.knob,
            setting=point.setting,
            condition=point.condition,
            attack_success=attack,
            over_refusal=refusal,
        )
        for point, attack, refusal in zip(points, attacks, refusals, strict=True)
    ]


def _shares(
    points: Sequence[Sweep], kind: Kind, metric: Metric, judges: Sequence[str]
) -> list[Estimate]:
    for judge in judges:
        outcomes = [
            [
                value
                for line in point.lines
                if line.kind == kind and (value := outcome(line, metric, judge)) is not None
            ]
            for point in points
        ]
        if all(outcomes):
            return [share(values) for values in outcomes]
    raise SafeguardError(
        f"No judge of {', '.join(judges)} could be read on the frontier's {kind} requests; add "
        "the judge 'refusal', which needs no model."
    )


def tuned(guard: Guard, *, strength: float | None = None, threshold: float | None = None) -> Guard:
    """A guard with one of its settings moved.

    Args:
        strength: of the edit, in place of its own (λ).
        threshold: what is added to the gate's thresholds, of the text and of the image, in units
            of the harm score: the harmful anchors' mean lies 2 above the harmless ones'.

    Raises:
        SafeguardError: the gate has no thresholds.
    """
    if strength is not None:
        guard = guard.variant(edit=replace(guard.policy.edit, strength=strength))
    if threshold is not None:
        criteria = guard.policy.gate
        if not any(isinstance(criterion, TextScore) for criterion in criteria):
            names = ", ".join(criterion.name for criterion in criteria)
            raise SafeguardError(f"The gate ({names}) has no threshold to move.")
        moved = [
            criterion.model_copy(update={"threshold": criterion.threshold + threshold})
            if isinstance(criterion, TextScore | ImageScore)
            else criterion
            for criterion in criteria
        ]
        guard = guard.variant(gate=tuple(moved))
    return guard
