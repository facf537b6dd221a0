"""An ask: a benchmark's sample under an image condition."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.attempt import Attempt
from vlm_safeguard.evaluation.asks.benchmarks.catalogue import BENCHMARKS
from vlm_safeguard.evaluation.asks.conditions import illustrated
from vlm_safeguard.evaluation.asks.samples import Kind, Sample
from vlm_safeguard.model.conversation import Chat


class AskRecord(BaseModel):
    """What is kept of an ask beside its answer.

    Attributes:
        number: its place in the benchmark.
        request: what is judged, whatever was shown.
        choices: of a utility question.
        attempt: how it was asked under an attack; None where it was not attacked.
    """

    model_config = ConfigDict(frozen=True)

    benchmark: str
    condition: str
    number: int
    kind: Kind
    category: str
    request: str
    choices: tuple[str, ...]
    attempt: Attempt | None = None


@dataclass(frozen=True)
class Ask:
    """What is asked once of every defence.

    Attributes:
        number: the sample's place in the benchmark, which noise and scenes depend on.
    """

    benchmark: str
    condition: str
    number: int
    sample: Sample

    def chat(self) -> Chat:
        """The conversation, its images loaded.

        Raises:
            SafeguardError: there is no such condition, or no image for it.
        """
        return illustrated(self.sample, self.number, self.condition)

    def record(self) -> AskRecord:
        """What is kept of it."""
        return AskRecord(
            benchmark=self.benchmark,
            condition=self.condition,
            number=self.number,
            kind=self.sample.kind,
            category=self.sample.category,
            request=self.sample.text,
            choices=self.sample.choices,
        )


@dataclass(frozen=True)
class AttackedAsk(Ask):
    """What is asked of one defence, under an attack.

    Attributes:
        attempt: what the attack made of it.
        folder: of the evaluation, in which its images are.
    """

    attempt: Attempt
    folder: Path

    @classmethod
    def of(cls, ask: Ask, attempt: Attempt, folder: Path) -> Self:
        """An ask under an attack."""
        fields = {name: getattr(ask, name) for name in Ask.__dataclass_fields__}
        return cls(**fields, attempt=attempt, folder=folder)

    def chat(self) -> Chat:
        """The conversation as the attack has it."""
        return self.attempt.chat(super().chat(), self.folder)

    def record(self) -> AskRecord:
        """What is kept of it, and of the attack."""
        return super().record().model_copy(update={"attempt": self.attempt})


def asks_of(
    benchmark: str,
    condition: str | None = None,
    *,
    path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Ask]:
    """A benchmark's samples under a condition, in the benchmark's order.

    Args:
        condition: its usual one by default.
        path: a local copy, or a data set on the Hub.
        limit: draws so many samples at random.

    Raises:
        SafeguardError: there is no such benchmark, or its data cannot be read.
    """
    if benchmark not in BENCHMARKS:
        raise SafeguardError(
            f"There is no benchmark '{benchmark}'; there are {', '.join(BENCHMARKS)}."
        )
    whole = list(enumerate(BENCHMARKS[benchmark].load(path)))
    if limit is not None and limit < len(whole):
        whole = sorted(random.Random(seed).sample(whole, limit), key=lambda each: each[0])
    shown = condition or BENCHMARKS[benchmark].usual_condition
    return [Ask(benchmark, shown, number, sample) for number, sample in whole]
