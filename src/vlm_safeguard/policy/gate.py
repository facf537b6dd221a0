"""The gate: which requests are edited. It is a tuple of criteria, any of which opens it.

A request's harm score is where its last-token state lies between the harmless and the harmful
anchors, centred, so that it does not matter where the origin happens to be. The thresholds are
calibrated on harmless requests that the directions have not seen.

To add a criterion, write its class here and name it in `AnyCriterion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat

from vlm_safeguard.policy.criterion import REFUSES, Criterion, Layers, Thresholded, Tokens
from vlm_safeguard.policy.discriminant_criteria import DeclinedDiscriminant, TextDiscriminant
from vlm_safeguard.policy.reading import Reading


class OwnRefusal(Criterion):
    """The language model would itself refuse, asked by the text alone.

    A model also declines a question about an image that it does not see. What it declines counts
    where the text scores nearer to the harmful anchors than to the harmless ones, or where it would
    decline about in the words of most of its refusals and the text does not score as low as
    questions about images do that it declines so.

    Attributes:
        tokens: that open the model's refusals.
        slack: logits by which a token of the refusal prefix may be less likely than the likeliest,
            for the refusal to be in about those words.
        layers: whose harm scores are averaged.
        score_above: that average, above which a refusal in whatever words counts.
        score_floor: that average, up to which no refusal counts; None for no such bound.
    """

    measures: ClassVar[tuple[str, ...]] = ("own_refusal", "own_opening", "own_text_score")

    name: Literal["own_refusal"] = "own_refusal"
    tokens: Tokens
    slack: FiniteFloat
    layers: Layers
    score_above: FiniteFloat = 0.0
    score_floor: FiniteFloat | None = None

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers of its harm score."""
        return self.layers

    def awaits_words(self, reading: Reading) -> torch.Tensor:
        """(n,) bool: where a refusal's first token leads and the text's score leaves it open."""
        assert reading.margin is not None
        return (reading.margin > 0) & self._leaves_open(reading.harm(self.layers).cpu())

    def score(self, reading: Reading) -> torch.Tensor:
        """Both margins, in logits, and the harm score."""
        assert reading.margin is not None
        assert reading.prefix_margin is not None
        harm = reading.harm(self.layers).cpu()
        return torch.stack([reading.margin, reading.prefix_margin, harm], dim=1)

    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Where a refusal's first token leads, and its words or the text's score speak for harm."""
        margin, prefix, harm = score.unbind(1)
        usual = (prefix > -self.slack) & self._leaves_open(harm)
        refuses = (margin > 0) & (usual | (harm > self.score_above))
        return refuses[:, None].expand(-1, window)

    def says(self, score: Sequence[float], opened: bool) -> str | None:
        """What the language model would do, where it would decline."""
        if opened:
            return REFUSES
        if score[0] > 0:
            return (
                "asked by its text alone, the language model would decline, but not for harm: the "
                f"text scores {score[2]:+.2f}"
            )
        return None

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The margins; the prefix's where it was asked for."""
        margin, prefix, harm = score
        read = margin > 0 and bool(self._leaves_open(torch.tensor(harm)))
        return {"own_refusal": margin} | ({"own_opening": prefix} if read else {})

    def _leaves_open(self, harm: torch.Tensor) -> torch.Tensor:
        """Bool: where the words of a refusal decide."""
        floor = -torch.inf if self.score_floor is None else self.score_floor
        return (harm > floor) & (harm <= self.score_above)


class RefusalWords(Criterion):
    """The language model would itself refuse, in about the words of most of its refusals.

    It is what of `OwnRefusal` can be read off log-probabilities, for engines that show no states. A
    refusal in other words does not open.

    Attributes:
        tokens: as `OwnRefusal` has them; `slack` likewise.
    """

    measures: ClassVar[tuple[str, ...]] = ("own_refusal", "own_opening")

    name: Literal["refusal_words"] = "refusal_words"
    tokens: Tokens
    slack: FiniteFloat

    def awaits_words(self, reading: Reading) -> torch.Tensor:
        """(n,) bool: where a refusal's first token leads."""
        assert reading.margin is not None
        return reading.margin > 0

    def score(self, reading: Reading) -> torch.Tensor:
        """Both margins, in logits."""
        assert reading.margin is not None
        assert reading.prefix_margin is not None
        return torch.stack([reading.margin, reading.prefix_margin], dim=1)

    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Where a refusal's first token leads, and its words follow."""
        margin, prefix = score.unbind(1)
        refuses = (margin > 0) & (prefix > -self.slack)
        return refuses[:, None].expand(-1, window)

    def says(self, score: Sequence[float], opened: bool) -> str:
        """What the language model would do."""
        if opened:
            return REFUSES
        if score[0] > 0:
            return (
                "asked by its text alone, the language model would begin as it refuses, and go on "
                "in other words"
            )
        return "asked by its text alone, the language model would answer"

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The margins; the prefix's where it was read, behind a first token that leads."""
        margin, prefix = score
        return {"own_refusal": margin} | ({"own_opening": prefix} if margin > 0 else {})


class TextScore(Thresholded):
    """The text's harm score passes a threshold.

    Attributes:
        layers: whose harm scores are averaged in the text-only pass.
    """

    measures: ClassVar[tuple[str, ...]] = ("text_score",)

    name: Literal["text_score"] = "text_score"
    layers: Layers

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers that are averaged."""
        return self.layers

    def score(self, reading: Reading) -> torch.Tensor:
        """The mean harm score."""
        return reading.harm(self.layers)[:, None]

    def says(self, score: Sequence[float], opened: bool) -> str:
        """The score beside the threshold."""
        return f"the text scores {self.compared(score, opened)}"

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The score and the threshold."""
        return {"text_score": score[0], "text_threshold": self.threshold}


class ImageScore(Thresholded):
    """The multimodal pass's own harm score passes a threshold: harm that the media carry.

    Attributes:
        layer: that is scored, no later than the first edited one.
    """

    reads: ClassVar[Literal["text", "image", "nothing"]] = "image"
    measures: ClassVar[tuple[str, ...]] = ("image_score",)

    name: Literal["image_score"] = "image_score"
    layer: int

    @property
    def watched(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)

    def score(self, reading: Reading) -> torch.Tensor:
        """The harm score at the layer."""
        return reading.harm((self.layer,))[:, None]

    def says(self, score: Sequence[float], opened: bool) -> str:
        """The score beside the threshold."""
        return f"with its media it scores {self.compared(score, opened)}"

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The score and the threshold."""
        return {"image_score": score[0], "image_threshold": self.threshold}


class PaperSign(Criterion):
    """The paper's gate, for each layer by itself: g_l = 1 where V_{1,l}·h_l(q) > 0, uncentred."""

    name: Literal["paper"] = "paper"

    def score(self, reading: Reading) -> torch.Tensor:
        """(n, window) the first coordinate in each edited layer."""
        first = [
            reading.states[layer].float() @ reading.directions.vectors[layer, 0]
            for layer in reading.window
        ]
        return torch.stack(first, dim=1)

    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Its sign."""
        return score > 0

    def says(self, score: Sequence[float], opened: bool) -> str:
        """In how many layers it opened."""
        count = sum(value > 0 for value in score)
        return f"the paper's gate is open in {count} of {len(score)} layers"

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The share of layers in which it opened."""
        return {"open_layers": sum(value > 0 for value in score) / len(score)}


class Always(Criterion):
    """Opens for every request. For controls."""

    reads: ClassVar[Literal["text", "image", "nothing"]] = "nothing"

    name: Literal["open"] = "open"

    def score(self, reading: Reading) -> torch.Tensor:
        """Not used: nothing needs to be known of the request."""
        raise AssertionError("this criterion reads no pass")

    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Everywhere."""
        return torch.ones(len(score), window, dtype=torch.bool)

    def says(self, score: Sequence[float], opened: bool) -> str:
        """That it is so."""
        return "the gate is always open"


AnyCriterion = Annotated[
    OwnRefusal
    | RefusalWords
    | DeclinedDiscriminant
    | TextScore
    | TextDiscriminant
    | ImageScore
    | PaperSign
    | Always,
    Field(discriminator="name"),
]
Gate = Annotated[tuple[AnyCriterion, ...], Field(min_length=1)]

#: Gates that need no calibration, by name.
GATES: dict[str, tuple[PaperSign | Always]] = {"paper": (PaperSign(),), "open": (Always(),)}
