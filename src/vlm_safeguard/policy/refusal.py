"""The language model's own decision, read off its logits: would it refuse, asked without the image?

A refusal shows in its first token, and "I'm sorry, but I can't assist" is told from "I'm sorry, but
I can't see a picture" by the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
