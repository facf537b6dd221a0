"""The gate's verdict on one request, from what the engine reads of its text.

These are the states of the text's last token, where workers read them, the log-probabilities of
what comes next, and, where the decision hangs on them, those of a refusal's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

import torch

from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.engines.vllm.view import read_rendered
from vlm_safeguard.policy.decision import decide
from vlm_safeguard.policy.own_refusal import RefusalWords
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.refusal import prefix_begun
from vlm_safeguard.policy.request import Request


class LogProb(Protocol):
    """A token's, as vLLM gives it."""

    @property
    def logprob(self) -> float:
        """Natural logarithm."""


#: Of one token behind a text: the likeliest ones' log-probabilities, and its own.
Entry = Mapping[int, LogProb] | None


@dataclass(frozen=True, eq=False)
class Answer:
    """What the engine gave to a question about a text: a request's, or one of its sentences.

    Attributes:
        first: of the token that comes next; None where no log-probabilities are asked for.
        words: of each of a refusal's words behind the text; empty where they are not read.
        said: these words, token ids.
        states: layer → (1, hidden) states of the text's last token; empty where none are read.
        coordinates: layer → (n, m) of the tokens that an edit needs; empty where none are read.
    """

    first: Entry = None
    words: Sequence[Entry] = ()
    said: tuple[int, ...] = ()
    states: Mapping[int, torch.Tensor] = field(default_factory=dict)
    coordinates: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Judge:
    """A policy that is `runnable`, as it is asked about requests.

    Attributes:
        sha256: the policy's.
        layers: whose states are read by workers; none where log-probabilities alone decide, and
            nothing is edited.
    """

    policy: Policy
    sha256: str = field(init=False)
    layers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", self.policy.sha256())
        words = all(isinstance(criterion, RefusalWords) for criterion in self.policy.gate)
        left = words and not self.policy.edits  # as they are
        object.__setattr__(self, "layers", () if left else self.policy.watched)

    @property
    def parts(self) -> int:
        """How many texts of one request are judged at most."""
        return 1 + (0 if self.policy.sentences is None else self.policy.sentences.most)

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are read: one that opens no refusal is among them.

        None where the model's own refusal is not asked for.
        """
        return None if self.policy.own_refusal is None else len(self.policy.refusal_tokens) + 1

    def read(self, prompt: Sequence[int], ranges: Iterable[tuple[int, int]]) -> Request:
        """See `read_rendered`."""
        return read_rendered(self.policy, prompt, ranges)

    def mark(self, **more: Any) -> Mark | None:
        """Of a request under this policy; None where no worker has to know of it."""
        return Mark(policy=self.sha256, **more) if self.layers else None

    def words(self, answer: Answer) -> tuple[int, ...]:
        """The words of a refusal that the text's would be compared with."""
        chances = answer.first or {}
        first = max(chances, key=lambda token: chances[token].logprob, default=-1)
        return prefix_begun(first, self.policy.prefixes)

    def awaits_words(self, answer: Answer, *, alone: bool) -> bool:
        """Whether the words of a refusal are yet to be read behind the text, to decide the gate.

        Args:
            alone: whether the text is a sentence of a request.

        Raises:
            ValueError: something else is missing in the answer.
        """
        return self._lack_words([answer], self._reading([answer]), [alone])

    def opening_leads(self, answer: Answer) -> list[float]:
        """`first_token_margin` wherever the engine showed it: behind the text, and in a prompt."""
        shown = [answer.first, *answer.words[:1]]
        return [_lead(entry, frozenset(self.policy.refusal_tokens)) for entry in shown]

    def margins(self, answer: Answer) -> tuple[float, float]:
        """The leads of a refusal's first token and of its least likely word, in logits.

        Differences of log-probabilities are those of logits, so they are what
        `refusal.first_token_margin` and `refusal.token_margin` give. Where the first one is
        negative it is a bound from above: tokens that are not among the likeliest are not seen.
        Where words are not read, the second one is the first.

        Raises:
            ValueError: log-probabilities are missing.
        """
        first, *_ = self.opening_leads(answer)
        if first <= 0 or not answer.words or answer.said != self.words(answer):
            return first, first
        words = zip(answer.words, answer.said, strict=True)
        return first, min(_lead(entry, frozenset({token})) for entry, token in words)

    def media_mark(self) -> Mark | None:
        """Of a request with media as it came, whose last state the gate may ask for."""
        if not self.policy.image_layers:
            return self.mark()
        return self.mark(name=uuid4().hex, position=-1)

    def awaits_image(self, receipt: Receipt) -> bool:
        """Whether the multimodal pass is yet to be asked, before a request is answered so."""
        return bool(self.policy.image_layers) and not receipt.guarded

    def receipt(
        self,
        request: Request,
        answers: Sequence[Answer],
        image: Mapping[int, torch.Tensor] | None = None,
    ) -> Receipt:
        """What the gate makes of a request, and so what is done to it.

        Args:
            answers: about its text, then about each of its sentences; none about a request without
                media, which is not judged.
            image: layer → (1, hidden) states of its own last token, beside its media; None where
                the multimodal pass is not asked, or not yet.

        Raises:
            ValueError: something is missing in it.
            SafeguardError: a score is not a number.
        """
        policy = self.policy
        window, rows, reading = len(policy.layers), range(len(answers)), None
        if answers:
            reading = self._reading(answers)
            if self._lack_words(answers, reading, [row > 0 for row in rows]):
                raise ValueError(
                    "the words of a refusal were not read, and the decision hangs on them"
                )
        decision = decide(policy.gate, "nothing", [rows[:1]], None, window)
        decision = decision.merged(decide(policy.gate, "text", [rows], reading, window))
        if image is not None:
            seen = Reading(image, policy.directions, policy.layers)
            decision = decision.merged(decide(policy.gate, "image", [rows[:1]], seen, window))
        return Receipt.of(
            request,
            decision.findings[0],
            response=policy.response if decision.is_open.any() else None,
            layers=tuple(n for n, x in zip(policy.layers, decision.is_open[0], strict=True) if x),
            edit=policy.edit.name,
            harm=None,
            policy=self.sha256,
        )

    def _lack_words(
        self, answers: Sequence[Answer], reading: Reading, alone: Sequence[bool]
    ) -> bool:
        """Whether one of these texts awaits words that were not read."""
        own = self.policy.own_refusal
        if own is None:
            return False
        unread = torch.tensor([each.said != self.words(each) for each in answers])
        return bool((own.awaits_words(reading, alone) & unread).any())

    def _reading(self, answers: Sequence[Answer]) -> Reading:
        """Of all these texts, a row each."""
        policy, first, least = self.policy, None, None
        if policy.own_refusal is not None:
            first, least = map(torch.tensor, zip(*map(self.margins, answers), strict=True))
        for answer in answers:
            if answer.states.keys() != set(self.layers):
                raise ValueError(
                    f"of layers {list(self.layers)}, {sorted(answer.states)} were read"
                )
        states = {
            layer: torch.cat([each.states[layer] for each in answers]) for layer in self.layers
        }
        return Reading(states, policy.directions, policy.layers, first, least, policy.discriminant)


def _lead(entry: Entry, among: frozenset[int]) -> float:
    """By how much the likeliest of some tokens leads all others.

    Where none of them is shown, they are no likelier than what is shown; that is a bound.
    """
    chances = {} if entry is None else {token: each.logprob for token, each in entry.items()}
    inside = [chance for token, chance in chances.items() if token in among]
    outside = [chance for token, chance in chances.items() if token not in among]
    if len(chances) <= len(among) or not outside:
        raise ValueError("a token's log-probabilities lack those that they are compared with")
    return max(inside, default=min(outside)) - max(outside)
