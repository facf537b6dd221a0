"""The gate's verdict on one request, from the log-probabilities of a refusal behind its text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vlm_safeguard.engines.vllm.view import read_rendered
from vlm_safeguard.policy.decision import decide
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.request import Request


class LogProb(Protocol):
    """A token's, as vLLM gives it."""

    @property
    def logprob(self) -> float:
        """Natural logarithm."""


#: Of one token of a prompt: its own log-probability, and the likeliest tokens' in its place.
Entry = Mapping[int, LogProb] | None


@dataclass(frozen=True, eq=False)
class Judge:
    """A policy that is `runnable`, as it is asked about requests.

    Attributes:
        sha256: the policy's.
    """

    policy: Policy
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", self.policy.sha256())

    @property
    def likeliest(self) -> int:
        """How many of the likeliest tokens are read: one that opens no refusal is among them."""
        return len(self.policy.refusal_tokens) + 1

    def read(self, prompt: Sequence[int], ranges: Iterable[tuple[int, int]]) -> Request:
        """See `read_rendered`."""
        return read_rendered(self.policy, prompt, ranges)

    def question(self, request: Request) -> list[int]:
        """Token ids to read: the request's text, and behind it the words of a refusal."""
        return [*request.text, *(self.policy.refusal_prefix or self.policy.refusal_tokens[:1])]

    def margins(self, request: Request, entries: Sequence[Entry]) -> tuple[float, float]:
        """The leads of a refusal's first token and of its least likely word, in logits.

        Differences of log-probabilities are those of logits, so they are what
        `refusal.first_token_margin` and `refusal.token_margin` give. Of several tokens that open
        refusals, the unlikely ones are not seen; where none is likely, the first margin is that of
        the prefix's own, no greater and of the same sign.

        Args:
            entries: of each token of the `question`.

        Raises:
            ValueError: some are missing.
        """
        asked, start = len(self.question(request)), len(request.text)
        if len(entries) != asked:
            raise ValueError(f"{asked} tokens were read, and {len(entries)} have log-probabilities")
        first = _lead(entries[start], frozenset(self.policy.refusal_tokens))
        if first <= 0:
            return first, first
        prefix = enumerate(self.policy.refusal_prefix, start)
        leads = (_lead(entries[place], frozenset({token})) for place, token in prefix)
        return first, min(leads, default=first)

    def receipt(self, request: Request, entries: Sequence[Entry] | None) -> Receipt:
        """What the gate makes of a request, and so what is done to it.

        Args:
            entries: as `margins` takes them; None for a request without media, which is not judged.

        Raises:
            ValueError: some are missing.
            SafeguardError: one is not a number.
        """
        policy, reading = self.policy, None
        if entries is not None:
            first, least = (torch.tensor([x]) for x in self.margins(request, entries))
            reading = Reading({}, policy.directions, policy.layers, first, least)
        asked = None if entries is None else 0
        decision = decide(policy.gate, "text", [asked], reading, len(policy.layers))
        return Receipt.of(
            request,
            decision.findings[0],
            response=policy.response if decision.is_open.any() else None,
            layers=(),
            edit=policy.edit.name,
            harm=None,
            policy=self.sha256,
        )


def _lead(entry: Entry, among: frozenset[int]) -> float:
    """By how much the likeliest of some tokens leads all others."""
    chances = {} if entry is None else {token: each.logprob for token, each in entry.items()}
    inside = [chance for token, chance in chances.items() if token in among]
    outside = [chance for token, chance in chances.items() if token not in among]
    if not inside or not outside:
        raise ValueError("a token's log-probabilities lack those that they are compared with")
    return max(inside) - max(outside)
