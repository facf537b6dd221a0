"""The generation prompt: where a request ends and the model's answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vlm_safeguard.policy.token_ids import last_place


class Place(NamedTuple):
    """A generation prompt in a text.

    Attributes:
        form: which of them, by name.
        start: where its first token stands.
        stop: where the answer begins.
    """

    form: str
    start: int
    stop: int


@dataclass(frozen=True)
class GenerationPrompt:
    """What a chat template writes between a request and its answer, as token ids.

    Attributes:
        forms: by name; more than one where the template has a switch ("enable_thinking=False") or
            begins an answer that it is given in another way.
        direct: behind which the model answers at once. Every text is judged at the end of this one,
            whatever form its prompt has and whatever of the answer stands behind it.
        special_ids: tokens that cannot stand in an answer: those that part turns among them.
        next_turn: what stands between an answer and the next request.
    """

    forms: dict[str, tuple[int, ...]]
    direct: tuple[int, ...]
    special_ids: frozenset[int] = frozenset()
    next_turn: tuple[int, ...] = ()

    def place(self, text: Sequence[int]) -> Place | None:
        """The last one in a text without images, in its longest form; None where there is none."""
        places = [
            Place(name, start, start + len(ids))
            for name, ids in self.forms.items()
            if (start := last_place(text, ids)) is not None
        ]
        return max(places, key=lambda place: (place.stop, -place.start), default=None)

    def judged(self, text: Sequence[int]) -> list[int]:
        """The request of a text without images, and the direct form behind it.

        Raises:
            ValueError: it holds no generation prompt.
        """
        place = self.place(text)
        if place is None:
            raise ValueError("it holds no generation prompt")
        return [*text[: place.start], *self.direct]

    def past(self, start: Sequence[int]) -> GenerationPrompt:
        """The same where the model answers at once only behind these tokens more."""
        return replace(self, direct=(*self.direct, *start))

    def holds_turn(self, answer: Sequence[int]) -> bool:
        """Whether what stands behind a generation prompt is more than an answer."""
        return not self.special_ids.isdisjoint(answer) or (
            bool(self.next_turn) and last_place(answer, self.next_turn) is not None
        )
