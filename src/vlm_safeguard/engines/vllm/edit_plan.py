"""Which states of a request vLLM's workers edit, and towards what: it travels with the request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict

from vlm_safeguard.engines.vllm.plain import from_bytes, to_bytes
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.request import Request
from vlm_safeguard.policy.span import Span


def tokens_read(policy: Policy, request: Request) -> tuple[int, ...]:
    """Places in a request's question whose coordinates an edit of it needs, in order.

    They are those of the edited tokens' counterparts, and of the refusal's words behind the text.
    """
    behind = range(len(request.text), len(request.text) + len(policy.followed))
    return tuple(sorted({token for _, token in request.spanned} | {*behind}))


class EditPlan(BaseModel):
    """Of one request.

    Attributes:
        layers: in which it is edited.
        positions: of the prompt's tokens that are edited, in order.
        counterparts: of each, its row in `coordinates`.
        last: the row of the text's last token; tokens with this counterpart are edited as the
            prompt's last one is.
        follows: token ids; the answer is edited for as long as it consists of these.
        first: the row of the first of these.
        whole_answer: whether every token of the answer is edited, as the prompt's last one is.
        coordinates: of each layer, (rows, m) float32 coordinates of the text-only pass, as bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    counterparts: tuple[int, ...]
    last: int
    follows: tuple[int, ...]
    first: int
    whole_answer: bool
    coordinates: tuple[bytes, ...]

    @classmethod
    def of(
        cls,
        policy: Policy,
        request: Request,
        layers: Sequence[int],
        coordinates: Mapping[int, torch.Tensor],
    ) -> Self:
        """For a request whose gate is open.

        Args:
            layers: in which it is.
            coordinates: layer → (n, m) float32, of the n tokens that `tokens_read` names.
        """
        rows = {token: row for row, token in enumerate(tokens_read(policy, request))}
        spoken = policy.spoken(request.prefill)
        return cls(
            layers=tuple(layers),
            positions=tuple(position for position, _ in request.spanned),
            counterparts=tuple(rows[token] for _, token in request.spanned),
            last=rows[len(request.text) - 1],
            follows=policy.followed[spoken:],
            first=len(rows) - len(policy.followed) + spoken,
            whole_answer=policy.edit.span is Span.ANSWER,
            coordinates=tuple(to_bytes(coordinates[n]) for n in layers),
        )

    def rows(
        self, start: int, count: int, prompt: int, answer: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Of a part of the request: which of its tokens are edited, and their counterparts.

        Args:
            start: position of the part's first token.
            count: how many tokens it has; those that are edited are numbered among them.
            prompt: how many tokens the whole prompt has.
            answer: token ids of the answer up to the part's end.
        """
        edited = [
            (position - start, counterpart)
            for position, counterpart in zip(self.positions, self.counterparts, strict=True)
            if start <= position < start + count
        ]
        places = range(max(start - prompt, 0), start + count - prompt)
        if self.whole_answer:
            edited += [(prompt + place - start, self.last) for place in places]
        else:
            followed = next(
                (n for n, (a, b) in enumerate(zip(answer, self.follows, strict=False)) if a != b),
                min(len(answer), len(self.follows)),
            )
            edited += [
                (prompt + place - start, self.first + place) for place in places if place < followed
            ]
        return [token for token, _ in edited], [counterpart for _, counterpart in edited]

    def coordinates_of(self, layer: int, rank: int) -> torch.Tensor:
        """(rows, rank) float32 of one of the `layers`."""
        return from_bytes(self.coordinates[self.layers.index(layer)]).view(-1, rank)
