"""What a gate asks of a request: one thing that can speak for harm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from vlm_safeguard.policy.reading import Reading

Layers = Annotated[tuple[int, ...], Field(min_length=1)]
Tokens = Annotated[tuple[int, ...], Field(min_length=1)]
REFUSES = "asked by its text alone, the language model would itself refuse"


class Criterion(BaseModel, ABC):
    """One thing that can speak for harm. What decides is its fields, which are saved.

    Attributes:
        name: in saved guards and receipts.
        reads: the pass that it decides on.
        measures: what the columns of its scores are called in receipts; unique among criteria.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reads: ClassVar[Literal["text", "image", "nothing"]] = "text"
    measures: ClassVar[tuple[str, ...]] = ()
    name: str

    @property
    def watched(self) -> tuple[int, ...]:
        """Layers whose states it reads, besides the edited ones."""
        return ()

    @abstractmethod
    def score(self, reading: Reading) -> torch.Tensor:
        """(n, measures) what it measures of each request of the pass that it reads."""

    @abstractmethod
    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """(n, window) bool: where each request's gate opens, a column for each edited layer."""

    @abstractmethod
    def says(self, score: Sequence[float], opened: bool) -> str | None:
        """One request's sentence; None where another criterion's says more."""

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """One request's measures by name, and what they were compared with."""
        return dict(zip(self.measures, score, strict=True))


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
