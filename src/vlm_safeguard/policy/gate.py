"""The gate: which requests are edited. It is a tuple of criteria, any of which opens it.

A request's harm score is where its last-token state lies between the harmless and the harmful
anchors, centred, so that it does not matter where the origin happens to be. The thresholds are
calibrated on harmless requests that the directions have not seen.

To add a criterion, write its class here and name it in `AnyCriterion`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat

from vlm_safeguard.policy.criterion import Criterion, Layers
from vlm_safeguard.policy.own_refusal import OwnRefusal, RefusalDiscriminant, RefusalWords
from vlm_safeguard.policy.reading import Reading


class Thresholded(Criterion, ABC):
    """One score passes a threshold, for all edited layers at once.

    Attributes:
        threshold: the score above which it opens.
        budget: share of harmless requests that it may open though the model would answer them,
            0–1.
        calibrated_on: harmless requests that the threshold was chosen on.
    """

    threshold: FiniteFloat
    budget: float = Field(gt=0, lt=1)
    calibrated_on: int

    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Where it is above the threshold, in all layers at once."""
        return (score > self.threshold).expand(-1, window)

    def compared(self, score: Sequence[float], opened: bool) -> str:
        """The score beside the threshold, in words."""
        return f"{score[0]:+.2f}, {'above' if opened else 'not above'} {self.threshold:+.2f}"


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


class TextDiscriminant(Thresholded):
    """The text's score under the policy's discriminant passes a threshold.

    Attributes:
        layers: whose scores are averaged in the text-only pass.
    """

    measures: ClassVar[tuple[str, ...]] = ("discriminant",)

    name: Literal["text_discriminant"] = "text_discriminant"
    layers: Layers

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers that are averaged."""
        return self.layers

    def score(self, reading: Reading) -> torch.Tensor:
        """The mean score."""
        return reading.discriminant_score(self.layers)[:, None]

    def says(self, score: Sequence[float], opened: bool) -> str:
        """The score beside the threshold."""
        return f"the discriminant gives the text {self.compared(score, opened)}"

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The score and the threshold."""
        return {"discriminant": score[0], "discriminant_threshold": self.threshold}


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
    | RefusalDiscriminant
    | RefusalWords
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
