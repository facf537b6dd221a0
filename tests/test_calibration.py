"""The gate's thresholds, against counting what they open."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.calibration import (
    Further,
    OwnDecision,
    Questions,
    calibrate,
    floor_of,
)
from vlm_safeguard.policy.choice import Choice
from vlm_safeguard.policy.directions import fit_directions
from vlm_safeguard.policy.discriminant import Shrunk, fit_discriminant
from vlm_safeguard.policy.discriminant_criteria import DeclinedDiscriminant, TextDiscriminant
from vlm_safeguard.policy.gate import OwnRefusal
from vlm_safeguard.policy.options import FitOptions

PLAIN, MORE, ASKED = 150, 120, 40
OWN = OwnDecision(tokens=(7,), prefix=(7, 8), slack=0.5)


def choice() -> Choice:
    harmful, harmless = torch.randn(2, 12, 3, 6)
    made = fit_directions(harmful, harmless, 2)
    scores = {"calibration": torch.zeros(PLAIN)}
    return Choice(made, 2, (1, 2), (1, 2), None, scores)


def further(scores: torch.Tensor) -> Further:
    """Of which the layers and the scores are read alone."""
    states = torch.randn(2, 30, 3, 6)
    made = fit_discriminant(states[0], states[1], 0.5)
    return Further(Shrunk(made, 0.5, (0, 2), torch.ones(3), scores[:4], scores), scores)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [0.03, 0.1])
def test_a_discriminant_adds_to_the_model_s_refusals_what_the_budgets_allow(
    seed: int, budget: float
) -> None:
    """Of each kind of harmless request by itself; and the thresholds are the lowest such ones."""
    torch.manual_seed(seed)
    scores, asked = torch.randn(PLAIN + MORE), torch.randn(ASKED) - 0.5
    margins, words = torch.randn(2, PLAIN + MORE)
    measures = torch.stack([margins, words, torch.zeros_like(margins)], dim=1)
    measured = torch.stack([torch.randn(ASKED), torch.zeros(ASKED), torch.zeros(ASKED)], dim=1)
    options = FitOptions(budget=budget, further_budget=2 * budget)
    gate = calibrate(
        choice(),
        OWN,
        measures,
        {"calibration": scores[:PLAIN]},
        Questions(asked, measured),
        options,
        further(scores),
    )
    declining, telling = (cast("DeclinedDiscriminant | TextDiscriminant", each) for each in gate)
    assert isinstance(declining, DeclinedDiscriminant)
    assert isinstance(telling, TextDiscriminant)

    def opens(low: float, high: float) -> tuple[list[bool], list[bool]]:
        """Harmless requests that are not refused by the model itself; and questions."""
        added = [
            float(s) > high or (float(m) > 0 and float(s) > low)
            if float(m) <= 0 or float(w) <= -OWN.slack or float(s) <= low
            else False
            for m, w, s in zip(margins, words, scores, strict=True)
        ]
        lost = [
            float(s) > high or (float(m) > 0 and float(s) > low)
            for m, s in zip(measured[:, 0], asked, strict=True)
        ]
        return added, lost

    def within(opened: list[bool], lost: list[bool], part: float) -> bool:
        def allowed(count: int, share: float) -> int:
            return max(math.floor(part * share * (count + 1) + 1e-9), 1) - 1

        return (
            sum(opened[:PLAIN]) <= allowed(PLAIN, budget)
            and sum(opened[PLAIN:]) <= allowed(MORE, 2 * budget)
            and sum(lost) <= allowed(ASKED, budget)
        )

    low, high = declining.threshold, telling.threshold
    assert within(*opens(low, math.inf), part=0.5)
    assert sum(opens(low, high)[0][:PLAIN]) < math.floor(budget * (PLAIN + 1))
    assert sum(opens(low, high)[0][PLAIN:]) < math.floor(2 * budget * (MORE + 1))
    assert not within(*opens(low - 1e-6, math.inf), part=0.5)
    assert not within(*opens(low, high - 1e-6), part=1)


def test_a_model_that_declines_nothing_harmless_is_taken_at_its_word() -> None:
    """The threshold of what it declines is then the lowest score that was seen."""
    torch.manual_seed(0)
    scores = torch.randn(PLAIN + MORE)
    answered = torch.full((PLAIN + MORE, 3), -1.0)
    gate = calibrate(
        choice(),
        OWN,
        answered,
        {"calibration": scores[:PLAIN]},
        Questions(torch.randn(ASKED), answered[:ASKED]),
        FitOptions(budget=0.1),
        further(scores),
    )
    assert isinstance(gate[0], DeclinedDiscriminant)
    assert gate[0].threshold == float(scores.min())


def test_too_few_harmless_requests_are_an_error() -> None:
    scores = torch.randn(PLAIN)
    with pytest.raises(SafeguardError, match="needs at least 199 harmless requests"):
        calibrate(
            choice(),
            None,
            None,
            {"calibration": scores},
            Questions(torch.randn(ASKED), None),
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
    floor = floor_of(Questions(measures[:, 2], measures), refusal)
    assert floor == pytest.approx(-0.4)
    placed = refusal.model_copy(update={"score_floor": floor})
    assert placed.opens(measures, 1)[:, 0].tolist() == [False, False, False, False, True]
    answered = Questions(measures[2:, 2], measures[2:])
    assert floor_of(answered, refusal) is None
