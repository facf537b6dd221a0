"""The gate's criteria of the language model's own refusal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat

from vlm_safeguard.policy.criterion import Criterion, Layers
from vlm_safeguard.policy.reading import Reading

Tokens = Annotated[tuple[int, ...], Field(min_length=1)]
_REFUSES = "asked by its text alone, the language model would itself refuse"


class ScoredRefusal(Criterion, ABC):
    """The language model would itself refuse, asked by the text alone.

    A model also declines a question about an image that it does not see. What it declines counts
    where the text scores nearer to what is harmful than to what is not, or where it would decline
    about in the words of most of its refusals and the text does not score as low as questions about
    images do that it declines. Only for texts that score in between are the words read. Of a
    sentence alone they are not: what a model declines of a request that it would answer as a whole
    ("I am stuck.") counts where harmless requests have none that scores so high.

    Attributes:
        tokens: that open the model's refusals.
        slack: logits by which a token of the refusal prefix may be less likely than the likeliest,
            for the refusal to be in about those words.
        layers: whose scores are averaged.
        score_above: that average, above which a refusal in whatever words counts.
        score_floor: that average, up to which no refusal counts; None for no such bound.
        alone_above: that average, above which the refusal of a sentence alone counts, in whatever
            words; None where none does.
    """

    measures: ClassVar[tuple[str, ...]] = ("own_refusal", "own_opening", "own_text_score")

    tokens: Tokens
    slack: FiniteFloat
    layers: Layers
    score_above: FiniteFloat = 0.0
    score_floor: FiniteFloat | None = None
    alone_above: FiniteFloat | None = None

    @property
    def watched(self) -> tuple[int, ...]:
        """The layers of the text's score."""
        return self.layers

    @abstractmethod
    def text_score(self, reading: Reading) -> torch.Tensor:
        """(n,) how harmful the texts are."""

    def awaits_words(self, reading: Reading, alone: Sequence[bool]) -> torch.Tensor:
        """(n,) bool: where a refusal's first token leads, and the text's score leaves it open.

        Args:
            alone: whether each is a sentence of a request, whose words do not count.
        """
        assert reading.margin is not None
        undecided = self._undecided(self.text_score(reading).cpu())
        return (reading.margin > 0) & undecided & ~torch.tensor(alone)

    def score(self, reading: Reading) -> torch.Tensor:
        """Both margins, in logits, and the text's score."""
        assert reading.margin is not None
        assert reading.prefix_margin is not None
        text = self.text_score(reading).cpu()
        return torch.stack([reading.margin, reading.prefix_margin, text], dim=1)

    def opens(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Where a refusal's first token leads, and its words or the text's score speak for harm."""
        margin, prefix, text = score.unbind(1)
        usual = (prefix > -self.slack) & self._undecided(text)
        refuses = (margin > 0) & (usual | (text > self.score_above))
        return refuses[:, None].expand(-1, window)

    def opens_alone(self, score: torch.Tensor, window: int) -> torch.Tensor:
        """Where a refusal's first token leads, and the sentence's score speaks for harm."""
        margin, _, text = score.unbind(1)
        least = torch.inf if self.alone_above is None else self.alone_above
        return ((margin > 0) & (text > least))[:, None].expand(-1, window)

    def says(self, score: Sequence[float], opened: bool) -> str | None:
        """What the language model would do, where it would decline."""
        if opened:
            return _REFUSES
        if score[0] > 0:
            return (
                "asked by its text alone, the language model would decline, but not for harm: the "
                f"text scores {score[2]:+.2f}"
            )
        return None

    def shown(self, score: Sequence[float]) -> dict[str, float]:
        """The margins; the prefix's where it was asked for."""
        margin, prefix, text = score
        read = margin > 0 and bool(self._undecided(torch.tensor(text)))
        return {"own_refusal": margin} | ({"own_opening": prefix} if read else {})

    def shown_alone(self, score: Sequence[float]) -> dict[str, float]:
        """The margin: of a sentence, the prefix's is not asked for."""
        return {"own_refusal": score[0]}

    def _undecided(self, text: torch.Tensor) -> torch.Tensor:
        floor = -torch.inf if self.score_floor is None else self.score_floor
        return (text > floor) & (text <= self.score_above)


class OwnRefusal(ScoredRefusal):
    """By the harm score."""

    name: Literal["own_refusal"] = "own_refusal"

    def text_score(self, reading: Reading) -> torch.Tensor:
        """The mean harm score."""
        return reading.harm(self.layers)


class RefusalDiscriminant(ScoredRefusal):
    """By the score under the discriminant, which tells harm from questions about images better."""

    name: Literal["refusal_discriminant"] = "refusal_discriminant"

    def text_score(self, reading: Reading) -> torch.Tensor:
        """The mean score under the discriminant."""
        return reading.discriminant_score(self.layers)


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

    def awaits_words(self, reading: Reading, alone: Sequence[bool]) -> torch.Tensor:
        """(n,) bool: where a refusal's first token leads, of texts as of sentences alone."""
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
            return _REFUSES
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
