"""Which rows of a pass's flattened hidden states are edited, and the edit of them.

Flattened rows are what engines have in common: a token's state stands at `start + position`, where
a batch of padded prompts starts request i at `i · width`, and a continuous batch where its query
starts, less the tokens that are computed already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Self

import torch

from vlm_safeguard.policy.edits import Edit, Reference
from vlm_safeguard.policy.request import Request


@dataclass(frozen=True)
class Rows:
    """Tokens to edit, (n,) each.

    Attributes:
        owner: whose they are: a request's number in its batch.
        position: where they stand in their request.
        token: their counterparts in the text-only pass, counted through all texts and what is read
            behind each (`token_starts`).
        last: whether it is edited as the prompt's last token is.
    """

    owner: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], behind: int) -> Self:
        """The prompts' rows.

        Args:
            behind: how many tokens the text-only pass reads behind each text.
        """
        starts = token_starts([request.text for request in requests], behind)
        entries = [
            (owner, position, starts[request.text] + token, token == len(request.text) - 1)
            for owner, request in enumerate(requests)
            for position, token in request.spanned
        ]
        owner, position, token, last = zip(*entries, strict=True)
        return cls(*map(torch.tensor, (owner, position, token, last)))

    @classmethod
    def none(cls) -> Self:
        """No tokens at all."""
        empty = torch.zeros(0, dtype=torch.long)
        return cls(empty, empty, empty, empty.bool())

    @property
    def final(self) -> torch.Tensor:
        """(n,) bool: of each owner's that are edited as the prompt's last token, the latest."""
        owners = int(self.owner.max()) + 1 if len(self) else 0
        places = torch.where(self.last, self.position, -1)
        latest = places.new_full((owners,), -1).scatter_reduce(0, self.owner, places, "amax")
        return self.last & (self.position == latest[self.owner])

    def moved(self, offsets: torch.Tensor) -> Rows:
        """The same, each request's positions counted from another place; (requests,) `offsets`."""
        return Rows(self.owner, self.position + offsets[self.owner], self.token, self.last)

    def between(self, start: int, stop: int) -> Rows:
        """Those at positions from `start` to before `stop`, counted from `start`."""
        chosen = self[(self.position >= start) & (self.position < stop)]
        return Rows(chosen.owner, chosen.position - start, chosen.token, chosen.last)

    @classmethod
    def of_answers(cls, ends: torch.Tensor, start: int, stop: int) -> Self:
        """Every answer's tokens at these positions of a pass, edited as the prompt's last one.

        Args:
            ends: (requests,) each text's last token.
        """
        count = stop - start
        return cls(
            torch.arange(len(ends)).repeat_interleave(count),
            torch.arange(start, stop).repeat(len(ends)),
            ends.repeat_interleave(count),
            torch.ones(len(ends) * count, dtype=torch.bool),
        )

    @classmethod
    def of_openings(
        cls,
        ends: torch.Tensor,
        answers: torch.Tensor,
        prefix: tuple[int, ...],
        spoken: torch.Tensor,
        new: int,
    ) -> Self:
        """The answers' tokens for as long as they follow a prefix, counted from a pass's first.

        Args:
            ends: (requests,) each text's last token.
            answers: (requests, tokens) ids of what was answered so far, behind the prompts.
            prefix: which is read behind each text.
            spoken: (requests,) how much of it the prompts hold; all of it where they, or what else
                speaks against it, leave nothing to follow.
            new: how many tokens, and their prompts' before them, the current pass reads.
        """
        count = min(len(prefix), answers.shape[1])
        start = answers.shape[1] - new
        if start >= count:  # without asking the device
            return cls.none()
        place = spoken[:, None] + torch.arange(count)
        wanted = torch.tensor([*prefix, -1])[place.clamp(max=len(prefix))]
        follows = (answers[:, :count].cpu() == wanted).cumprod(1).bool()
        follows[:, : max(start, 0)] = False
        owner, number = follows.nonzero().unbind(1)
        token = ends[owner] + 1 + place[owner, number]
        return cls(owner, number - start, token, torch.zeros_like(owner).bool())

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(*(getattr(self, f.name).to(device) for f in fields(self)))

    def __getitem__(self, chosen: torch.Tensor) -> Rows:
        return Rows(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.owner)

    def __add__(self, other: Rows) -> Rows:
        return Rows(
            *(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self))
        )


def token_starts(texts: Sequence[tuple[int, ...]], behind: int) -> dict[tuple[int, ...], int]:
    """Where each different text begins when tokens are counted through, with some behind each."""
    different = list(dict.fromkeys(texts))
    lengths = [len(text) + behind for text in different]
    return dict(zip(different, accumulate(lengths, initial=0)))  # noqa: B905 - one start more


def edit_rows(
    edit: Edit, hidden: torch.Tensor, V: torch.Tensor, index: torch.Tensor, at: Reference
) -> torch.Tensor:
    """The states with some rows edited; the others are the very same.

    Args:
        hidden: (rows, hidden) flattened states of a pass.
        V: (m, hidden) orthonormal rows of the layer's subspace.
        index: (n,) the rows to edit.
        at: what each of these is edited towards, (n, m).
    """
    out = hidden.clone()
    out[index] = edit(hidden[index], V, at)
    return out


def edit_masked(
    edit: Edit, hidden: torch.Tensor, V: torch.Tensor, mask: torch.Tensor, at: Reference
) -> torch.Tensor:
    """The same where shapes may not depend on what is open: compiled graphs.

    Args:
        hidden: (rows, hidden) flattened states of a pass.
        mask: (rows,) bool, the rows to edit.
        at: what each row would be edited towards, (rows, m); not looked at where the mask is False.
    """
    return torch.where(mask[:, None], edit(hidden, V, at), hidden)
