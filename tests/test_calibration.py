"""The gate's thresholds, against counting what they open."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.calibration import (
    Further,
    Judged,
    OwnDecision,
    calibrate,
    floor_of,
)
from vlm_safeguard.policy.choice import Choice
from vlm_safeguard.policy.directions import fit_directions
from vlm_safeguard.policy.discriminant import Shrunk, fit_discriminant
from vlm_safeguard.policy.gate import TextDiscriminant
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.own_refusal import OwnRefusal, RefusalDiscriminant

PLAIN, MORE, ASKED = 150, 120, 40
OWN = OwnDecision(tokens=(7,), prefix=(7, 8), slack=0.5)


def choice() -> Choice:
    harmful, harmless = torch.randn(2, 12, 3, 6)
    made = fit_directions(harmful, harmless, 2)
    scores = {"calibration": torch.zeros(PLAIN)}
    return Choice(made, 2, (1, 2), (1, 2), None, scores)


def further(scores: torch.Tensor, judged: Judged) -> Further:
    """Of which the layers are read alone."""
    states = torch.randn(2, 30, 3, 6)
    made = fit_discriminant(states[0], states[1], 0.5)
    return Further(Shrunk(made, 0.5, (0, 2), torch.ones(3), scores[:4], scores), judged)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [0.03, 0.1])
@pytest.mark.parametrize("declines", [True, False])
def test_a_gate_adds_to_the_model_s_refusals_what_the_budgets_allow(
    seed: int, budget: float, *, declines: bool
) -> None:
    """Of each kind of harmless request by itself; and the threshold is the lowest such one."""
    torch.manual_seed(seed)
    scores, asked = torch.randn(PLAIN + MORE), torch.randn(ASKED) - 0.5
    measures, measured = torch.randn(PLAIN + MORE, 2), torch.randn(ASKED, 2)
    if not declines:
        measured[:, 0] = -1
    harmless = Judged.whole(scores, measures)
    refusal, score = calibrate(
        choice(),
        OWN,
        harmless,
        {"calibration": scores[:PLAIN]},
        Judged.whole(asked, measured),
        FitOptions(budget=budget, further_budget=2 * budget),
        further(scores, harmless),
    )
    assert isinstance(refusal, RefusalDiscriminant)
    assert isinstance(score, TextDiscriminant)
    declined = [float(s) for s, (margin, _) in zip(asked, measured, strict=True) if margin > 0]
    assert refusal.score_floor == (pytest.approx(max(declined)) if declines else None)
    floor = max(declined) if declines else -math.inf

    def added(high: float) -> list[bool]:
        """Which harmless requests the score opens for that the model does not refuse."""
        return [
            float(s) > high
            and not (m > 0 and (s > max(0, floor) or (s > floor and w > -OWN.slack)))
            for s, (m, w) in zip(scores, measures, strict=True)
        ]

    def within(high: float) -> bool:
        opened = added(high)
        return (
            sum(opened[:PLAIN]) < math.floor(budget * (PLAIN + 1))
            and sum(opened[PLAIN:]) < math.floor(2 * budget * (MORE + 1))
            and sum(
                float(s) > high and not (m > 0 and s > max(0, floor))
                for s, (m, _) in zip(asked, measured, strict=True)
            )
            < max(math.floor(budget * (ASKED + 1)), 1)
        )

    assert within(score.threshold)
    assert not within(score.threshold - 1e-6)


def test_too_few_harmless_requests_are_an_error() -> None:
    scores = torch.randn(PLAIN)
    with pytest.raises(SafeguardError, match="needs at least 199 harmless requests"):
        calibrate(
            choice(),
            None,
            Judged.whole(scores, None),
            {"calibration": scores},
            Judged.whole(torch.randn(ASKED), None),
            FitOptions(budget=0.005),
        )


# --- what follows from questions about an image ---


def test_no_question_about_an_image_is_declined_into_an_open_gate() -> None:
    """The floor is the highest of those that a refusal in its usual words would open it for."""
    refusal = OwnRefusal(tokens=(7,), slack=1.0, layers=(1,))
    measures = torch.tensor(
        [
            [2.0, 1.0, -0.9],  # declined in the usual words
            [2.0, -0.5, -0.4],  # likewise, about
            [2.0, -3.0, -0.1],  # in others
            [-1.0, -1.0, -0.2],  # answered
            [2.0, 1.0, 0.3],  # refused, and it scores as harmful
        ]
    )
    floor = floor_of(Judged.whole(measures[:, 2], measures[:, :2]), refusal)
    assert floor == pytest.approx(-0.4)
    placed = refusal.model_copy(update={"score_floor": floor})
    assert placed.opens(measures, 1)[:, 0].tolist() == [False, False, False, False, True]
    answered = Judged.whole(measures[2:, 2], measures[2:, :2])
    assert floor_of(answered, refusal) is None
