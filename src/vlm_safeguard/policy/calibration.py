"""The gate of a model: the criterion of its own decision, and thresholds on harmless requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.choice import Choice
from vlm_safeguard.policy.discriminant import Shrunk
from vlm_safeguard.policy.gate import AnyCriterion, ImageScore, TextDiscriminant, TextScore
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.own_refusal import OwnRefusal, RefusalDiscriminant, ScoredRefusal
from vlm_safeguard.policy.threshold import threshold_for


@dataclass(frozen=True)
class OwnDecision:
    """How the model itself refuses; no tokens where its first token says too little.

    Attributes:
        tokens: that its refusals open with.
        prefix: what most of them begin with.
        slack: logits by which a token of that may lag, as the anchors that it refuses show.
        other_prefixes: what most of those in other languages begin with.
    """

    tokens: tuple[int, ...]
    prefix: tuple[int, ...]
    slack: float
    other_prefixes: tuple[tuple[int, ...], ...] = ()

    @property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The prefix, then the other languages' ones."""
        return (self.prefix, *self.other_prefixes)


@dataclass(frozen=True)
class Judged:
    """What a gate judges of n requests: their texts, and their sentences alone.

    Attributes:
        scores: (texts,) that the gate's criterion of the text has a threshold for.
        measures: (texts, 2) `own_measures`; None where the model's own decision cannot be read.
        owners: (texts,) the request of each.
    """

    scores: torch.Tensor
    measures: torch.Tensor | None
    owners: torch.Tensor

    @classmethod
    def whole(cls, scores: torch.Tensor, measures: torch.Tensor | None) -> Self:
        """Of requests of one text each."""
        return cls(scores, measures, torch.arange(len(scores)))

    def __len__(self) -> int:
        return int(self.owners.max()) + 1

    @property
    def is_parted(self) -> bool:
        """Whether sentences are judged."""
        return len(self.scores) > len(self)

    @property
    def highest(self) -> torch.Tensor:
        """(n,) the highest score of each request."""
        return self._highest(self.scores)

    @property
    def declined(self) -> torch.Tensor:
        """(n,) likewise of its sentences that the model declines; −inf where there is none."""
        assert self.measures is not None
        counts = self.measures[:, 0] > 0
        counts[: len(self)] = False
        return self._highest(self.scores.masked_fill(~counts, -torch.inf))

    def opened(self, refusal: ScoredRefusal) -> torch.Tensor:
        """(n,) bool: the requests whose text opens the gate, as the model itself would refuse."""
        assert self.measures is not None
        opened = refusal.opens(torch.column_stack([self.measures, self.scores]), 1)[:, 0]
        return opened[: len(self)]

    def _highest(self, values: torch.Tensor) -> torch.Tensor:
        lowest = values.new_full((len(self),), -torch.inf)
        return lowest.scatter_reduce(0, self.owners, values, "amax")


@dataclass(frozen=True)
class Further:
    """What follows from requests in further forms: wrapped, in other languages, second turns.

    Attributes:
        shrunk: the discriminant, and the layers that the gate reads of it.
        judged: of the calibration requests, then of those in further forms, by discriminants that
            have seen neither their topics nor their wrappers.
    """

    shrunk: Shrunk
    judged: Judged


def calibrate(
    choice: Choice,
    own: OwnDecision | None,
    harmless: Judged,
    scores: dict[str, torch.Tensor],
    questions: Judged,
    options: FitOptions,
    further: Further | None = None,
) -> tuple[AnyCriterion, ...]:
    """The gate: the model's own decision, and thresholds on what that does not open.

    The calibration requests and the questions about an image keep the budget each by themselves: a
    question that opens the gate loses the image that it is about.

    Args:
        harmless: the calibration requests, in all forms where there are further ones.
        questions: harmless ones about an image, read without it.
        further: what makes the text's score that of a discriminant.

    Raises:
        SafeguardError: too few calibration requests for the budget.
    """
    image, count = scores.get("calibration_image"), len(scores["calibration"])
    text, asked = harmless.highest, questions.highest
    share = options.budget if image is None else options.budget / 2
    opened = torch.zeros(len(text), dtype=torch.bool)
    lost = torch.zeros(len(asked), dtype=torch.bool)
    budgets = share, max(share, options.further_budget)
    gate: list[AnyCriterion] = []
    refusal = None if own is None else _refusal(choice, own, questions, further)
    if refusal is not None:
        opened, lost = harmless.opened(refusal), questions.opened(refusal)
    try:
        threshold = _threshold(
            text.masked_fill(opened, -torch.inf),
            asked.masked_fill(lost, -torch.inf),
            count,
            budgets,
        )
        if refusal is not None:
            alone = _alone_above(refusal, harmless, questions, threshold, count, budgets)
            gate.append(refusal.model_copy(update={"alone_above": alone}))
        thresholded: dict[str, Any] = {
            "threshold": threshold,
            "budget": share,
            "calibrated_on": len(text),
        }
        if further is None:
            gate.append(TextScore(layers=choice.legible, **thresholded))
        else:
            gate.append(TextDiscriminant(layers=further.shrunk.layers, **thresholded))
        if image is not None:
            assert choice.image_layer is not None
            gate.append(
                ImageScore(
                    layer=choice.image_layer,
                    threshold=threshold_for(image.masked_fill(opened[:count], -torch.inf), share),
                    budget=share,
                    calibrated_on=count,
                )
            )
    except ValueError as error:
        raise SafeguardError(f"The gate cannot be calibrated: {error}.") from error
    return tuple(gate)


def _refusal(
    choice: Choice, own: OwnDecision, questions: Judged, further: Further | None
) -> OwnRefusal | RefusalDiscriminant:
    """The criterion of the model's own decision, with the floor that the questions give it."""
    if further is None:
        refusal = OwnRefusal(tokens=own.tokens, slack=own.slack, layers=choice.legible)
        return refusal.model_copy(update={"score_floor": floor_of(questions, refusal)})
    assert questions.measures is not None
    declined = questions.scores[: len(questions)][questions.measures[: len(questions), 0] > 0]
    highest = float(declined.max()) if len(declined) else None
    return RefusalDiscriminant(
        tokens=own.tokens,
        slack=own.slack,
        layers=further.shrunk.layers,
        score_above=max(0.0, highest or 0.0),
        score_floor=highest,
    )


def _alone_above(
    refusal: ScoredRefusal,
    harmless: Judged,
    questions: Judged,
    threshold: float,
    count: int,
    budgets: tuple[float, float],
) -> float | None:
    """The score above which the refusal of a sentence alone counts; None where none is judged.

    What the score opens for by itself counts as well, so that the budgets bound both together.

    Args:
        threshold: of the score.
        count: as `_threshold` has it; `budgets` likewise.
    """
    if not harmless.is_parted:
        return None
    declined, asked = (
        judged.declined.masked_fill(judged.highest > threshold, torch.inf).masked_fill(
            judged.opened(refusal), -torch.inf
        )
        for judged in (harmless, questions)
    )
    lowest = refusal.score_above if refusal.score_floor is None else refusal.score_floor
    return max(_threshold(declined, asked, count, budgets), lowest)


def _threshold(
    scores: torch.Tensor, questions: torch.Tensor, count: int, budgets: tuple[float, float]
) -> float:
    """The lowest that keeps plain requests, those in further forms and questions within budget.

    Args:
        scores: of the calibration requests, the first `count` as they are; −inf where they are open
            already.
        questions: likewise, of questions about an image.
        budgets: of plain requests and questions, and of those in further forms.
    """
    plain, more = scores[:count], scores[count:]
    bounds = [
        threshold_for(plain, budgets[0]),
        # the highest question's score, where they are few
        threshold_for(questions, max(budgets[0], 1 / len(questions))),
    ]
    if len(more):
        bounds.append(threshold_for(more, budgets[1]))
    return max(bounds)


def floor_of(questions: Judged, refusal: OwnRefusal) -> float | None:
    """The harm score up to which no refusal counts.

    The highest among the questions about an image that a refusal in its usual words opens the gate
    for, though they score as harmless; None where there are none.

    Args:
        refusal: without a floor.
    """
    assert questions.measures is not None
    harm, measures = questions.scores, questions.measures
    opened = refusal.opens(torch.column_stack([measures, harm]), 1)[:, 0]
    lost = opened & (harm <= refusal.score_above)
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
