"""Where a request's sentences begin and end: it is judged whole, and each sentence by itself.

What a language model's last state tells is what a text asks for on the whole, and at its end. So a
harmless request beside a harmful one hides it from a gate that reads both at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.token_ids import last_place


@dataclass(frozen=True)
class Sentences:
    """How a request is parted.

    Attributes:
        ends: tokens that a sentence or a line may end with.
        opener: what stands right before a request; empty where nothing does.
        shortest: tokens of a sentence, at least; a shorter one goes with its neighbour.
        most: parts of one request, at most. Where it has more sentences, neighbours share a part.
    """

    ends: frozenset[int]
    opener: tuple[int, ...]
    shortest: int
    most: int

    def alone(self, text: tuple[int, ...], prompt: GenerationPrompt) -> list[tuple[int, ...]]:
        """Each sentence of a text's last request as a request of its own; none where it has one.

        What was said in earlier turns is left out of them, a system prompt is not.

        Args:
            text: token ids without media, that end in the prompt's direct form.
        """
        said = text[: len(text) - len(prompt.direct)]
        first, last = self._starts(said, prompt)
        bounds = [last, *self._stops(said, last)]
        if len(bounds) - 1 > self.most:
            step = (len(bounds) - 1) / self.most
            bounds = [bounds[round(step * number)] for number in range(self.most + 1)]
        if len(bounds) <= 2:
            return []
        parts = (said[start:stop] for start, stop in pairwise(bounds))
        return [(*said[:first], *part, *prompt.direct) for part in parts]

    def start(self, text: tuple[int, ...], prompt: GenerationPrompt) -> tuple[int, ...]:
        """What stands before a text's first request; nothing where that cannot be found.

        Args:
            text: see `alone`.
        """
        said = text[: len(text) - len(prompt.direct)]
        first, _ = self._starts(said, prompt)
        return said[:first] if first < len(said) else ()

    def _stops(self, said: tuple[int, ...], start: int) -> list[int]:
        """Where the sentences from `start` on stop: each behind all that ends it."""
        stops = [start]
        for place in range(start + self.shortest, len(said) - self.shortest + 1):
            ended = said[place - 1] in self.ends and said[place] not in self.ends
            if ended and place - stops[-1] >= self.shortest:
                stops.append(place)
        return [*stops[1:], len(said)]

    def _starts(self, said: tuple[int, ...], prompt: GenerationPrompt) -> tuple[int, int]:
        """Where a conversation's first request starts, and where its last one does.

        Where either cannot be found, both are the end, so that there are no sentences.
        """
        answer = prompt.place(said)
        turn = 0 if answer is None else answer.stop
        first, last = self._behind_opener(said), self._behind_opener(said[turn:])
        if first is None or last is None:
            return len(said), len(said)
        return first, turn + last

    def _behind_opener(self, said: tuple[int, ...]) -> int | None:
        """Where the first opener ends: what is typed in a request comes later."""
        if not self.opener:
            return 0
        behind = last_place(said[::-1], self.opener[::-1])
        return None if behind is None else len(said) - behind
