"""The rows of `results.json`: a share or mean with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.statistics import Estimate, share

Metric = Literal[
    "refusal",
    "accuracy",
    "attack_success",
    "unreadable",
    "perplexity",
    "kl",
    "tokens",
    "seconds",
]
#: The metrics that are shares of answers.
SHARES: tuple[Metric, ...] = ("refusal", "accuracy", "attack_success", "unreadable")
#: The model as it is, the guard as it is fitted, and a request without an image.
BASELINE, DEFAULT, TEXT = "none", "default", "text"


class Row(BaseModel):
    """One cell of a results table.

    Shares (`SHARES`) are in 0–1 with a 95 % Wilson interval. The other metrics have a 95 %
    bootstrap interval and units of their own: perplexity; KL in nats a token; new tokens and
    seconds an answer.

    Attributes:
        prompts: the kind of request.
        n: answers that the value is a share or mean of.
        benchmark: where the prompts come from; None for the demo's own.
        judge: whose verdicts were counted; None where none was needed, and for the demo's.
    """

    model_config = ConfigDict(frozen=True)

    defence: str
    condition: str
    prompts: Kind
    metric: Metric
    benchmark: str | None = None
    judge: str | None = None
    n: int
    value: float
    low: float
    high: float

    @property
    def benchmark_name(self) -> str:
        """What it was measured on; the demo's rows have no benchmark's name."""
        return self.benchmark or f"{self.prompts} prompts"

    @classmethod
    def count(cls, outcomes: Sequence[bool], **names: Any) -> Self:
        """The row of a list of yes/no outcomes."""
        return cls.of(share(outcomes), **names)

    @classmethod
    def of(cls, estimate: Estimate, **names: Any) -> Self:
        """The row of a share, a mean, a ratio or a perplexity."""
        return cls(**asdict(estimate), **names)
