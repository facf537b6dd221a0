"""The language model's own decision, read off its logits: would it refuse, asked without the image?

A refusal shows in its first token, and "I'm sorry, but I can't assist" is told from "I'm sorry, but
I can't see a picture" by the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch


@dataclass(frozen=True)
class Opening:
    """How the answers to n texts would begin.

    Attributes:
        margin: (n,) `first_token_margin`, on the CPU.
        begun: of each text, `prefix_begun` by its likeliest next token.
        likeliest: of each text, what `likeliest_prefixes` gives.
    """

    margin: torch.Tensor
    begun: list[tuple[int, ...]]
    likeliest: list[tuple[int, ...]]

    @classmethod
    def of(
        cls, logits: torch.Tensor, tokens: tuple[int, ...], prefixes: Sequence[tuple[int, ...]]
    ) -> Self:
        """By the (n, vocabulary) logits of the next tokens.

        Args:
            tokens: that refusals open with.
            prefixes: that refusals begin with.
        """
        margin = first_token_margin(logits, tokens).cpu()
        if len(prefixes) == 1:  # as most guards have it: then no more is asked of the device
            alone = [prefixes[0]] * len(logits)
            return cls(margin, alone, alone)
        return cls(
            margin,
            [prefix_begun(token, prefixes) for token in logits.argmax(-1).tolist()],
            likeliest_prefixes(logits, prefixes),
        )

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """One after the other."""
        margins, begun, likeliest = zip(
            *((each.margin, each.begun, each.likeliest) for each in parts), strict=True
        )
        return cls(torch.cat(margins), [*chain(*begun)], [*chain(*likeliest)])


def first_token_margin(logits: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    """By how much the likeliest of `tokens` leads all other next tokens; above 0 it is the next.

    So it is the decision that greedy decoding makes, in logits (log-odds of the two tokens).

    Args:
        logits: (n, vocabulary) of the next token.
        tokens: that refusals open with.

    Returns:
        (n,) float32.
    """
    refusals = torch.tensor(tokens, device=logits.device)
    others = logits.index_fill(1, refusals, -torch.inf)
    return (logits[:, refusals].amax(-1) - others.amax(-1)).float()


def prefix_begun(token: int, prefixes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The first of these prefixes that begins with a token; the first of all where none does."""
    return next((prefix for prefix in prefixes if prefix[:1] == (token,)), prefixes[0])


def likeliest_prefixes(
    logits: torch.Tensor, prefixes: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Of each row of (n, vocabulary) next-token logits, the prefix with the likeliest first token.

    So a refusal is begun in the language that the model would answer in. An empty prefix has none.
    """
    spoken = [prefix for prefix in prefixes if prefix]
    if not spoken:
        return [()] * len(logits)
    firsts = torch.tensor([prefix[0] for prefix in spoken], device=logits.device)
    return [spoken[number] for number in logits[:, firsts].argmax(-1).tolist()]


def token_margin(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """By how much each row's token leads all others; the least over a prefix is that prefix's.

    Above 0 at all of its tokens, a prefix is, word for word, what greedy decoding would say.

    Args:
        logits: (n, vocabulary) of the next token.
        tokens: (n,) one a row.

    Returns:
        (n,) float32.
    """
    chosen = tokens[:, None].to(logits.device)
    others = logits.scatter(1, chosen, -torch.inf)
    return (logits.gather(1, chosen)[:, 0] - others.amax(-1)).float()
