"""What a gate asks of a request: one thing that can speak for harm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from vlm_safeguard.policy.reading import Reading

Layers = Annotated[tuple[int, ...], Field(min_length=1)]


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

    def opens_alone(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """As `opens`, of sentences, each of which is read as a request of its own."""
        return self.opens(score, window)

    @abstractmethod
    def says(self, score: Sequence[float], opened: bool) -> str | None:
        """One request's sentence; None where another criterion's says more."""

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """One request's measures by name, and what they were compared with."""
        return dict(zip(self.measures, score, strict=True))

    def shown_alone(self, score: Sequence[float]) -> dict[str, float]:
        """As `shown`, of a sentence that is read as a request of its own."""
        return self.shown(score)
