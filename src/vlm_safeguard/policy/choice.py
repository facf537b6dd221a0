"""What follows from a model's measurements: layers, the gate's criteria, and their thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.directions import (
    Directions,
    choose_layers,
    fit_directions,
    held_out_scores,
    legible_before,
    legible_layers,
)
from vlm_safeguard.policy.discriminant import Shrunk
from vlm_safeguard.policy.gate import (
    AnyCriterion,
    ImageScore,
    OwnRefusal,
    TextDiscriminant,
    TextScore,
)
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.threshold import threshold_for


@dataclass(frozen=True)
class TextStates:
    """Of each group of texts that a guard is fitted on, its last tokens' states.

    Attributes:
        harmful: (pairs, layers, hidden) of the harmful anchors; `harmless` likewise.
        calibration: (requests, layers, hidden).
        final: of the three groups, (n, hidden) states that predict the next token.
    """

    harmful: torch.Tensor
    harmless: torch.Tensor
    calibration: torch.Tensor
    final: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Choice:
    """What follows from the states of texts.

    Attributes:
        layers: that are edited.
        legible: those of them that the gate reads.
        image_layer: of the multimodal pass that the gate reads; None where none is worth it.
        scores: (n,) harm scores over the legible layers: `harmful` and `harmless` anchors, held
            out, and `calibration` requests.
    """

    directions: Directions
    rank: int
    layers: tuple[int, ...]
    legible: tuple[int, ...]
    image_layer: int | None
    scores: dict[str, torch.Tensor]


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


def choose(
    texts: TextStates, rank: int, layers: Sequence[int] | None, options: FitOptions
) -> Choice:
    """Directions of every layer, and which layers are edited and read."""
    pairs, count = texts.harmful.shape[:2]
    held_out = held_out_scores(texts.harmful, texts.harmless, options.folds)
    stored = min(max(options.stored_rank, rank), pairs)
    directions = fit_directions(texts.harmful, texts.harmless, stored, held_out=held_out)
    if layers is None:
        layers = choose_layers(count, options.first_layer, options.last_layer)
    legible = legible_layers(directions, layers, options.near_best)
    columns = list(legible)
    return Choice(
        directions=directions,
        rank=rank,
        layers=tuple(layers),
        legible=legible,
        image_layer=legible_before(directions, layers[0], options.legible),
        scores={
            "harmful": held_out[0][:, columns].mean(1),
            "harmless": held_out[1][:, columns].mean(1),
            "calibration": directions.harm_scores(texts.calibration)[:, columns].mean(1),
        },
    )


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
    count = len(text)
    opened = torch.zeros(count if further is None else len(further.scores), dtype=torch.bool)
    answered = torch.ones(len(questions.text), dtype=torch.bool)
    gate: list[AnyCriterion] = []
    if own is not None:
        refusal = OwnRefusal(tokens=own.tokens, slack=own.slack, layers=choice.legible)
        floor = floor_of(questions, refusal)
        refusal = refusal.model_copy(update={"score_floor": floor})
        assert measures is not None
        assert questions.measures is not None
        opened = refusal.opens(measures, 1)[:, 0]
        gate.append(refusal)
        answered = ~refusal.opens(questions.measures, 1)[:, 0]
    share = options.budget if image is None else options.budget / 2

    def threshold(scores: torch.Tensor) -> float:
        return threshold_for(scores.masked_fill(opened[: len(scores)], -torch.inf), share)

    def threshold_of_forms(scores: torch.Tensor) -> float:
        added = scores.masked_fill(opened, -torch.inf)
        more = max(share, options.further_budget)
        return max(threshold_for(added[:count], share), threshold_for(added[count:], more))

    try:
        asked = threshold_for(
            questions.text.masked_fill(~answered, -torch.inf),
            max(share, 1 / len(answered)),  # the highest question's score, where they are few
        )
        if further is None:
            gate.append(
                TextScore(
                    layers=choice.legible,
                    threshold=max(threshold(text), asked),
                    budget=share,
                    calibrated_on=count,
                )
            )
        else:
            gate.append(
                TextDiscriminant(
                    layers=further.shrunk.layers,
                    threshold=max(threshold_of_forms(further.scores), asked),
                    budget=share,
                    calibrated_on=len(further.scores),
                )
            )
        if image is not None:
            assert choice.image_layer is not None
            gate.append(
                ImageScore(
                    layer=choice.image_layer,
                    threshold=threshold(image),
                    budget=share,
                    calibrated_on=count,
                )
            )
    except ValueError as error:
        raise SafeguardError(f"The gate cannot be calibrated: {error}.") from error
    return tuple(gate)


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
