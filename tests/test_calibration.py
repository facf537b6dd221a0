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


def calibrated(
    harmless: Judged, questions: Judged, options: FitOptions
) -> tuple[RefusalDiscriminant, TextDiscriminant]:
    """The gate of a discriminant, of `PLAIN` requests as they are and `MORE` in further forms."""
    scores = harmless.scores[: PLAIN + MORE]
    refusal, score = calibrate(
        choice(),
        OWN,
        harmless,
        {"calibration": scores[:PLAIN]},
        questions,
        options,
        further(scores, harmless),
    )
    assert isinstance(refusal, RefusalDiscriminant)
    assert isinstance(score, TextDiscriminant)
    return refusal, score


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
    refusal, score = calibrated(
        Judged.whole(scores, measures),
        Judged.whole(asked, measured),
        FitOptions(budget=budget, further_budget=2 * budget),
    )
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


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("lean", [-9.0, -1.0, 0.5])
def test_the_budgets_bound_the_score_and_the_refusal_of_sentences_together(
    seed: int, lean: float
) -> None:
    """Of each kind of request by itself; and the lowest score above which such a refusal counts.

    Args:
        lean: of the margins with which sentences are refused.
    """
    torch.manual_seed(seed)
    texts, asked = PLAIN + MORE, ASKED
    owners = torch.cat([torch.arange(texts), torch.randint(texts, (400,))])
    scores, measures = torch.randn(len(owners)), torch.randn(len(owners), 2)
    measures[texts:, 0] += lean
    measures[texts:, 1] = torch.nan  # the words of sentences are not read
    questions_of = torch.cat([torch.arange(asked), torch.randint(asked, (9,))])
    measured = torch.randn(len(questions_of), 2)
    measured[asked:, 1] = torch.nan
    questions = Judged(torch.randn(len(questions_of)) - 1, measured, questions_of)
    harmless = Judged(scores, measures, owners)
    budgets = 0.05, 0.1
    refusal, score = calibrated(
        harmless, questions, FitOptions(budget=budgets[0], further_budget=budgets[1])
    )
    above, floor, alone = refusal.score_above, refusal.score_floor, refusal.alone_above
    assert floor is not None
    assert alone is not None

    def opened(judged: Judged, least: float) -> list[bool]:
        """Which requests are open that the model does not refuse as a whole."""
        assert judged.measures is not None
        count = int(judged.owners.max()) + 1
        found = [False] * count
        for owner, value, (margin, word) in zip(
            judged.owners.tolist(), judged.scores.tolist(), judged.measures.tolist(), strict=True
        ):
            found[owner] |= value > score.threshold or (
                word != word and margin > 0 and value > least
            )
        for row in range(count):
            value, (margin, word) = float(judged.scores[row]), judged.measures[row].tolist()
            if margin > 0 and (value > above or (value > floor and word > -OWN.slack)):
                found[row] = False
        return found

    def within(least: float) -> bool:
        found = opened(harmless, least)
        return (
            sum(found[:PLAIN]) < math.floor(budgets[0] * (PLAIN + 1))
            and sum(found[PLAIN:]) < math.floor(budgets[1] * (MORE + 1))
            and sum(opened(questions, least)) < math.floor(budgets[0] * (ASKED + 1))
        )

    assert alone >= floor
    assert within(alone)
    assert alone == floor or not within(alone - 1e-6)


def test_a_gate_that_judges_texts_whole_knows_of_no_refused_sentences() -> None:
    torch.manual_seed(0)
    refusal, _ = calibrated(
        Judged.whole(torch.randn(PLAIN + MORE), torch.randn(PLAIN + MORE, 2)),
        Judged.whole(torch.randn(ASKED), torch.randn(ASKED, 2)),
        FitOptions(budget=0.1),
    )
    assert refusal.alone_above is None


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
