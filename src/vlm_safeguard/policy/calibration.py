"""The gate of a model: the criterion of its own decision, and thresholds on harmless requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.choice import Choice
from vlm_safeguard.policy.discriminant import Shrunk
from vlm_safeguard.policy.discriminant_criteria import DeclinedDiscriminant, TextDiscriminant
from vlm_safeguard.policy.gate import AnyCriterion, ImageScore, OwnRefusal, TextScore
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.threshold import threshold_for


@dataclass(frozen=True)
class OwnDecision:
    """How the model itself refuses; no tokens where its first token says too little.

    Attributes:
        tokens: that its refusals open with.
        prefix: what most of them begin with.
        slack: logits by which a token of that may lag, as the anchors that it refuses show.
    """

    tokens: tuple[int, ...]
    prefix: tuple[int, ...]
    slack: float


@dataclass(frozen=True)
class Further:
    """What follows from requests in further forms: wrapped, in other languages, second turns.

    Attributes:
        shrunk: the discriminant, and the layers that the gate reads of it.
        scores: (requests,) of the calibration requests, then of those in further forms, each by
            discriminants that have seen neither its topic nor its wrapper.
    """

    shrunk: Shrunk
    scores: torch.Tensor


@dataclass(frozen=True)
class Questions:
    """Of harmless questions about an image, read without one.

    Attributes:
        text: (questions,) scores that the gate's criterion of the text has a threshold for.
        measures: (questions, 3) what `OwnRefusal` measures of them; None where the model's own
            decision cannot be read.
    """

    text: torch.Tensor
    measures: torch.Tensor | None


def calibrate(
    choice: Choice,
    own: OwnDecision | None,
    measures: torch.Tensor | None,
    scores: dict[str, torch.Tensor],
    questions: Questions,
    options: FitOptions,
    further: Further | None = None,
) -> tuple[AnyCriterion, ...]:
    """The gate: the model's own decision, and thresholds on what that does not open.

    The calibration requests and the questions about an image keep the budget each by themselves: a
    question that opens the gate loses the image that it is about.

    Args:
        measures: (requests, 3) what `OwnRefusal` measures of the calibration requests, in all forms
            where there are further ones; None where the model's own decision cannot be read.
        further: what makes the text's criterion a discriminant.

    Raises:
        SafeguardError: too few calibration requests for the budget.
    """
    text, image = scores["calibration"], scores.get("calibration_image")
    share = options.budget if image is None else options.budget / 2
    budget = _Budget(len(text), share, max(share, options.further_budget))
    try:
        if further is None:
            gate, opened = _by_harm(choice, own, measures, text, questions, budget)
        else:
            gate, opened = _by_discriminant(own, measures, questions, budget, further)
        if image is not None:
            assert choice.image_layer is not None
            added = image.masked_fill(opened[: len(image)], -torch.inf)
            seen = ImageScore(
                layer=choice.image_layer,
                threshold=threshold_for(added, share),
                budget=share,
                calibrated_on=len(image),
            )
            gate = (*gate, seen)
    except ValueError as error:
        raise SafeguardError(f"The gate cannot be calibrated: {error}.") from error
    return gate


@dataclass(frozen=True)
class _Budget:
    """Shares of harmless requests that a criterion may add to what the model refuses.

    Attributes:
        count: how many calibration requests come as they are, before those in further forms.
        share: of these, and of questions about an image; `further` of those in further forms.
    """

    count: int
    share: float
    further: float

    @property
    def half(self) -> _Budget:
        """Half of each share; none is added where that is less than one request."""
        return _Budget(self.count, max(self.share / 2, 1 / self.count), self.further / 2)

    def threshold(self, scores: torch.Tensor, questions: torch.Tensor) -> float:
        """The lowest that keeps within it, for each kind by itself; −inf where nothing is added.

        Args:
            scores: of the calibration requests; −inf of those that are not added, +inf of those
                that were by another criterion.
            questions: likewise.

        Raises:
            ValueError: the calibration requests are too few for their share.
        """
        plain, more = scores[: self.count], scores[self.count :]
        bounds = [
            threshold_for(plain, self.share),
            threshold_for(questions, max(self.share, 1 / len(questions))),
        ]
        if len(more):
            bounds.append(threshold_for(more, max(self.further, 1 / len(more))))
        return max(bounds)


def _by_harm(
    choice: Choice,
    own: OwnDecision | None,
    measures: torch.Tensor | None,
    text: torch.Tensor,
    questions: Questions,
    budget: _Budget,
) -> tuple[tuple[AnyCriterion, ...], torch.Tensor]:
    """Criteria that score texts by harm scores, and which calibration requests the first opens."""
    refusing: tuple[AnyCriterion, ...] = ()
    opened = torch.zeros(len(text), dtype=torch.bool)
    lost = torch.zeros(len(questions.text), dtype=torch.bool)
    if own is not None:
        assert measures is not None
        assert questions.measures is not None
        refusal = OwnRefusal(tokens=own.tokens, slack=own.slack, layers=choice.legible)
        floor = floor_of(questions, refusal)
        refusal = refusal.model_copy(update={"score_floor": floor})
        opened = refusal.opens(measures, 1)[:, 0]
        lost = refusal.opens(questions.measures, 1)[:, 0]
        refusing = (refusal,)
    score = TextScore(
        layers=choice.legible,
        threshold=budget.threshold(
            text.masked_fill(opened, -torch.inf), questions.text.masked_fill(lost, -torch.inf)
        ),
        budget=budget.share,
        calibrated_on=len(text),
    )
    return (*refusing, score), opened


def _by_discriminant(
    own: OwnDecision | None,
    measures: torch.Tensor | None,
    questions: Questions,
    budget: _Budget,
    further: Further,
) -> tuple[tuple[AnyCriterion, ...], torch.Tensor]:
    """Criteria that score texts by a discriminant, and which requests the first opens.

    What the first adds to the model's refusals, up to half of the budget, the second cannot.
    """
    scores, asked, layers = further.scores, questions.text, further.shrunk.layers
    refusing: tuple[AnyCriterion, ...] = ()
    opened = torch.zeros(len(scores), dtype=torch.bool)
    if own is not None:
        assert measures is not None
        assert questions.measures is not None
        declined = measures[:, 0] > 0
        refused = declined & (measures[:, 1] > -own.slack)
        bound = budget.half.threshold(
            scores.masked_fill(~declined | refused, -torch.inf),
            asked.masked_fill(questions.measures[:, 0] <= 0, -torch.inf),
        )
        refusal = DeclinedDiscriminant(
            tokens=own.tokens,
            slack=own.slack,
            layers=layers,
            threshold=max(bound, float(scores.min())),
            budget=budget.half.share,
            calibrated_on=len(scores),
        )
        refusing = (refusal,)
        opened = declined & (scores > refusal.threshold)
        scores = scores.masked_fill(opened & refused, -torch.inf)
        scores = scores.masked_fill(opened & ~refused, torch.inf)
    score = TextDiscriminant(
        layers=layers,
        threshold=budget.threshold(scores, asked),
        budget=budget.share,
        calibrated_on=len(scores),
    )
    return (*refusing, score), opened


def floor_of(questions: Questions, refusal: OwnRefusal) -> float | None:
    """The harm score up to which no refusal counts.

    The highest among the questions about an image that a refusal in its usual words opens the gate
    for, though they score as harmless; None where there are none.

    Args:
        refusal: without a floor.
    """
    assert questions.measures is not None
    harm = questions.measures[:, 2]
    lost = refusal.opens(questions.measures, 1)[:, 0] & (harm <= refusal.score_above)
    return float(harm[lost].max()) if lost.any() else None


def slack_of(margins: torch.Tensor, fence: float) -> float:
    """By how many logits a token of the refusal prefix may lag, for a refusal in about those words.

    The lower outer fence (Tukey 1977) of the margins with which the model says the prefix to the
    anchors, where that is below 0.

    Args:
        margins: (n,) `prefix_margins` of anchors that the model refuses, in whatever words.
        fence: in interquartile ranges below the first quartile.
    """
    spoken = margins[margins > 0]
    if not len(spoken):
        return 0.0
    first, third = map(float, torch.quantile(spoken, torch.tensor([0.25, 0.75])))
    return max(0.0, fence * (third - first) - first)
