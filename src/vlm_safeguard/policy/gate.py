"""The gate: which requests are edited.

A request is scored by where its last-token state lies between the harmless and the harmful
anchors, centred, so that it does not matter where the origin happens to be. The thresholds are
calibrated on harmless requests that the directions have not seen.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from vlm_safeguard.policy.directions import Directions

#: Logits by which a word of the usual refusal may be less likely than the likeliest: development
#: prompts that the Coder VLM refuses stay within 0.4, pictures that it cannot see begin at 1.5.
_NEARLY = 1.0


class Gate(BaseModel):
    """Decides on a request from its states; one subclass for each rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_text: ClassVar[bool] = True  # decides on the text-only pass

    @property
    def watched(self) -> tuple[int, ...]:
        """Layers whose states it reads, besides the edited ones."""
        return ()

    @abstractmethod
    def text_open(
        self, states: dict[int, torch.Tensor], directions: Directions, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The decision that the text-only pass gives.

        Args:
            states: layer → (rows, hidden) last-token states of the text-only pass.
            directions: on the states' device.
            layers: the layers to be edited.

        Returns:
            (rows, layers) bool, where the gate is open, and (rows,) scores.
        """


class CalibratedGate(Gate):
    """Open for all edited layers at once, where any of three things speaks for harm.

    The language model would itself refuse, asked without the image; or the text's centred score
    passes its threshold; or the multimodal pass's does. The first is the model's own decision. A
    model also declines a question about a picture that it does not see: what it declines counts
    where it would do so about in the words of most of its refusals, or where the text scores
    nearer to the harmful anchors than to the harmless ones. The budget bounds what the other two
    add to it.

    Attributes:
        refusal_tokens: tokens that open the model's refusals; where empty, its own decision is
            not asked for.
        layers: layers whose scores are averaged in the text-only pass.
        text_threshold: score above which the text opens the gate.
        image_layer: layer of the multimodal pass that is scored, no later than the first edited
            one, for harm that the image carries; None where the image is not looked at.
        image_threshold: score above which the multimodal pass opens the gate; None likewise.
        budget: share of harmless requests that may open the gate though the model would answer
            them, 0–1.
        calibrated_on: harmless requests that the thresholds were chosen on.
    """

    name: Literal["calibrated"] = "calibrated"
    refusal_tokens: tuple[int, ...] = ()
    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    text_threshold: FiniteFloat
    image_layer: int | None = None
    image_threshold: FiniteFloat | None = None
    budget: float = Field(gt=0, lt=1)
    calibrated_on: int

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers of both scores."""
        return self.layers if self.image_layer is None else (*self.layers, self.image_layer)

    @model_validator(mode="after")
    def _image_or_not(self) -> Self:
        if (self.image_layer is None) != (self.image_threshold is None):
            raise ValueError("image_layer and image_threshold go together")
        return self

    @staticmethod
    def heeds(margin: float, opening: float, score: float) -> bool:
        """Whether the model's own decision opens the gate.

        Args:
            margin: the refusal's, as `refusal.refusal_margin` gives it.
            opening: the whole opening's, as `refusal.words_margin` gives it.
            score: the text's.
        """
        return margin > 0 and (opening > -_NEARLY or score > 0)

    def text_open(
        self, states: dict[int, torch.Tensor], directions: Directions, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean centred score over `self.layers` against the threshold."""
        scores = torch.stack(
            [directions.harm_score(states[layer], layer) for layer in self.layers]
        ).mean(0)
        return (scores > self.text_threshold)[:, None].expand(-1, len(layers)), scores


class PaperGate(Gate):
    """The paper's gate, for each layer by itself: g_l = 1 where V_{1,l}·h_l(q) > 0, uncentred."""

    name: Literal["paper"] = "paper"

    def text_open(
        self, states: dict[int, torch.Tensor], directions: Directions, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sign of the first coordinate; the score is the share of layers that are open."""
        coordinates = torch.stack(
            [states[layer].float() @ directions.vectors[layer, 0] for layer in layers], dim=1
        )
        is_open = coordinates > 0
        return is_open, is_open.float().mean(1)


class OpenGate(Gate):
    """Always open: every request is edited. For controls."""

    name: Literal["open"] = "open"
    needs_text: ClassVar[bool] = False

    def text_open(
        self, states: dict[int, torch.Tensor], directions: Directions, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Not used: nothing needs to be known of the request."""
        raise AssertionError("an open gate has no text-only pass")


#: Gates that need no calibration, by name.
GATES: dict[str, type[PaperGate | OpenGate]] = {"paper": PaperGate, "open": OpenGate}
AnyGate = Annotated[CalibratedGate | PaperGate | OpenGate, Field(discriminator="name")]


def threshold_for(harmless: torch.Tensor, budget: float) -> float:
    """The lowest threshold that keeps false positives within `budget`, by split conformal rank.

    A new harmless request, exchangeable with the calibration ones, scores above it with
    probability at most `budget`: it is the k-th largest score, k = ⌊budget · (n + 1)⌋.

    Args:
        harmless: (n,) scores of held-out harmless requests.

    Raises:
        ValueError: too few requests for the budget to mean anything (k = 0).
    """
    k = math.floor(budget * (len(harmless) + 1))
    if k < 1:
        raise ValueError(
            f"a false-positive budget of {budget:.2%} needs at least "
            f"{math.ceil(1 / budget) - 1} harmless requests; there are {len(harmless)}"
        )
    return float(harmless.sort(descending=True).values[k - 1])
