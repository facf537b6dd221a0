"""The frontier: how attack success trades against over-refusal as a guard's settings move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.results.counting import outcome
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.rows import Metric
from vlm_safeguard.evaluation.statistics import Estimate, share


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
