"""The gate's criteria that score a text by the discriminant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import FiniteFloat

from vlm_safeguard.policy.criterion import REFUSES, Layers, Thresholded, Tokens
from vlm_safeguard.policy.reading import Reading


class DeclinedDiscriminant(Thresholded):
    """The language model's first token would be a refusal's, and the text's score is no question's.

    A model also declines questions about an image that it does not see, and begins other answers
    with such a token. By the discriminant these score lower than what it refuses for harm.

    Attributes:
        tokens: that open the model's refusals.
        slack: as `RefusalWords` has it, for engines that have this gate's words alone.
        layers: whose scores are averaged in the text-only pass.
    """

    measures: ClassVar[tuple[str, ...]] = ("own_refusal", "declined_discriminant")

    name: Literal["declined_discriminant"] = "declined_discriminant"
    tokens: Tokens
    slack: FiniteFloat
    layers: Layers

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers that are averaged."""
        return self.layers

    def awaits_words(self, reading: Reading) -> torch.Tensor:
        """(n,) bool: nowhere, as the score decides."""
        assert reading.margin is not None
        return torch.zeros_like(reading.margin, dtype=torch.bool)

    def score(self, reading: Reading) -> torch.Tensor:
        """The lead of a refusal's first token, in logits, and the mean score."""
        assert reading.margin is not None
        return torch.stack([reading.margin, reading.discriminant_score(self.layers).cpu()], dim=1)

    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Where a refusal's first token leads, and the score is above the threshold."""
        margin, told = score.unbind(1)
        declined = (margin > 0) & (told > self.threshold)
        return declined[:, None].expand(-1, window)

    def says(self, score: Sequence[float], opened: bool) -> str | None:
        """What the language model would do, where it would decline."""
        if opened:
            return REFUSES
        if score[0] > 0:
            return (
                "asked by its text alone, the language model would begin as it refuses, but not "
                f"for harm: the discriminant gives the text {self.compared(score[1:], opened)}"
            )
        return None

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The lead; where it is above 0, the score and the threshold."""
        margin, told = score
        read = {"declined_discriminant": told, "declined_threshold": self.threshold}
        return {"own_refusal": margin} | (read if margin > 0 else {})


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
