"""How a model refuses: its refusals' first tokens and words, and how near it is to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from vlm_safeguard.model.activations import read_start
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.policy.refusal import Opening, first_token_margin, token_margin
from vlm_safeguard.progress import bar

_ROWS = 64  # rows whose logits are held at once


@torch.no_grad()
def refusal_tokens(
    backbone: Backbone, harmful: torch.Tensor, harmless: torch.Tensor, likelier: float
) -> tuple[int, ...]:
    """Ids of the tokens that open a refusal; none where the model refuses too little to tell.

    They are those that are likelier after harmful requests than after harmless ones.

    Args:
        harmful: (n, hidden) final states of the harmful anchors, as `run_text` returns them.
        harmless: (n, hidden) those of the harmless ones.
        likelier: the difference of mean probabilities that makes a token a refusal's, 0–1.
    """
    means = []
    for states in (harmful, harmless):
        total = torch.zeros(())
        for rows in torch.split(states, _ROWS):
            total = total + backbone.next_token_logits(rows).softmax(-1).sum(0).cpu()
        means.append(total / len(states))
    return tuple(((means[0] - means[1]) > likelier).nonzero()[:, 0].tolist())


@torch.no_grad()
def refusal_margins(
    backbone: Backbone, states: torch.Tensor, tokens: tuple[int, ...]
) -> torch.Tensor:
    """`first_token_margin` after final states.

    Args:
        states: (n, hidden) final states, as `run_text` returns them.

    Returns:
        (n,) float32, on the CPU.
    """
    margins = [
        first_token_margin(backbone.next_token_logits(rows), tokens)
        for rows in torch.split(states, _ROWS)
    ]
    return torch.cat(margins).cpu()


@torch.no_grad()
def read_opening(
    backbone: Backbone,
    states: torch.Tensor,
    tokens: tuple[int, ...],
    prefixes: Sequence[tuple[int, ...]],
) -> Opening:
    """`Opening.of` answers after (n, hidden) final states, as `run_text` returns them."""
    return Opening.joined(
        Opening.of(backbone.next_token_logits(rows), tokens, prefixes)
        for rows in torch.split(states, _ROWS)
    )


@torch.no_grad()
def refusal_prefix(
    backbone: Backbone, read: TextPass, refused: Sequence[tuple[int, ...]], longest: int
) -> tuple[int, ...]:
    """The longest start, of `longest` tokens at most, that half of a model's refusals share.

    Args:
        read: a pass of the prompts.
        refused: prompts that the model refuses, in its chat template, without images.

    Returns:
        Token ids; none where there is no such start.
    """
    prefix: tuple[int, ...] = ()
    sharing = list(refused)
    while sharing and len(prefix) < longest:
        states = backbone.go_on(read, sharing, prefix)[:, -1] if prefix else read.final
        next_tokens = backbone.next_token_logits(states).argmax(-1).tolist()
        token, count = Counter(next_tokens).most_common(1)[0]
        if 2 * count < len(refused):
            break
        sharing = [
            prompt for prompt, each in zip(sharing, next_tokens, strict=True) if each == token
        ]
        prefix += (token,)
    return prefix


@torch.no_grad()
def declined_prefix_margins(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    opening: Opening,
) -> torch.Tensor:
    """(requests,) `prefix_margins` of requests as token ids, along the prefix that each begins.

    Only declined ones are read.
    """
    margins = opening.margin
    words = margins.clone()
    declined = sorted(
        (margins > 0).nonzero()[:, 0].tolist(), key=lambda request: len(rows[request])
    )
    if not declined:
        return words
    begun = [opening.begun[request] for request in declined]
    start = read_start(backbone, [rows[request] for request in declined], max(map(len, begun)))
    with bar(len(declined), "words of refusals", "request") as shown:
        for prefix in filter(None, dict.fromkeys(begun)):
            mine = [n for n, each in zip(declined, begun, strict=True) if each == prefix]
            for first in range(0, len(mine), _ROWS):
                part = mine[first : first + _ROWS]
                states = backbone.run_text([rows[request] for request in part], prefix, start)
                words[part] = prefix_margins(backbone, states, prefix, margins[part])
                shown.update(len(part))
    return words


@torch.no_grad()
def prefix_margins(
    backbone: Backbone, states: torch.Tensor, prefix: tuple[int, ...], margins: torch.Tensor
) -> torch.Tensor:
    """The least lead of the prefix's tokens, of the texts that the model would refuse.

    Args:
        states: (n, 1 + tokens, hidden) final states, as `run_text` returns them with the prefix.
        margins: (n,) from `refusal_margins`.

    Returns:
        (n,) float32, on the CPU; those of texts that it would not refuse are as in `margins`.
    """
    words, refusing = margins.clone(), margins > 0
    if not prefix or not refusing.any():
        return words
    before = states[refusing, : len(prefix)].flatten(0, 1)
    wanted = torch.tensor(prefix, device=states.device).repeat(int(refusing.sum()))
    leads = [
        token_margin(backbone.next_token_logits(rows), tokens)
        for rows, tokens in zip(torch.split(before, _ROWS), torch.split(wanted, _ROWS), strict=True)
    ]
    words[refusing] = torch.cat(leads).view(-1, len(prefix)).amin(1).cpu()
    return words
