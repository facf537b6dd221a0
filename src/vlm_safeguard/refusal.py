"""The language model's own decision: would it refuse this request, asked without the image?

A refusal shows in its first token. Which tokens open a refusal is read off the anchors: those
that are likelier after harmful requests than after harmless ones. What most refusals go on with
is read off the anchors that the model refuses: "I'm sorry, but I can't assist" tells them from
"I'm sorry, but I can't see a picture".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from vlm_safeguard.model.backbone import Backbone

_LIKELIER = 0.05  # difference of mean probabilities that makes a token a refusal's opening
_OPENING = 12  # tokens of a refusal's opening at most: "I'm sorry, but I can't assist with that."
_ROWS = 64  # rows whose logits are held at once


@torch.no_grad()
def opening_tokens(
    backbone: Backbone, harmful: torch.Tensor, harmless: torch.Tensor
) -> tuple[int, ...]:
    """Ids of the tokens that open a refusal; none where the model refuses too little to tell.

    Args:
        harmful: (n, hidden) final states of the harmful anchors, as `run_text` returns them.
        harmless: (n, hidden) those of the harmless ones.
    """
    means = []
    for states in (harmful, harmless):
        total = torch.zeros(())
        for rows in torch.split(states, _ROWS):
            total = total + backbone.next_token_logits(rows).softmax(-1).sum(0).cpu()
        means.append(total / len(states))
    return tuple(((means[0] - means[1]) > _LIKELIER).nonzero()[:, 0].tolist())


@torch.no_grad()
def refusal_margin(
    backbone: Backbone, states: torch.Tensor, tokens: tuple[int, ...]
) -> torch.Tensor:
    """By how much the likeliest of `tokens` leads all other next tokens; above 0 it is the next.

    So it is the decision that greedy decoding makes, in logits (log-odds of the two tokens).

    Args:
        states: (n, hidden) final states, as `run_text` returns them.

    Returns:
        (n,) float32, on the CPU.
    """
    found = []
    for rows in torch.split(states, _ROWS):
        logits = backbone.next_token_logits(rows)
        opening = torch.tensor(tokens, device=logits.device)
        others = logits.index_fill(1, opening, -torch.inf)
        found.append((logits[:, opening].amax(-1) - others.amax(-1)).float())
    return torch.cat(found).cpu()


@torch.no_grad()
def refusal_opening(backbone: Backbone, refused: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest start, of twelve tokens at most, that half of a model's refusals share.

    Args:
        refused: prompts that the model refuses, in its chat template, without images.

    Returns:
        Token ids; none where there is no such start.
    """
    opening: tuple[int, ...] = ()
    sharing = list(refused)
    while sharing and len(opening) < _OPENING:
        states = backbone.run_text(sharing, opening)[:, -1]
        said = backbone.next_token_logits(states).argmax(-1).tolist()
        token, count = Counter(said).most_common(1)[0]
        if 2 * count < len(refused):
            break
        sharing = [prompt for prompt, each in zip(sharing, said, strict=True) if each == token]
        opening += (token,)
    return opening


@torch.no_grad()
def opening_margin(
    backbone: Backbone, states: torch.Tensor, opening: tuple[int, ...]
) -> torch.Tensor:
    """By how much each token of `opening` leads all others in its place, at the least.

    Above 0 it is, word for word, what greedy decoding would say.

    Args:
        states: (n, 1 + tokens, hidden) final states, as `run_text` returns them with the opening.

    Returns:
        (n,) float32, on the CPU.
    """
    before = states[:, : len(opening)].flatten(0, 1)
    wanted = torch.tensor(opening, device=states.device).repeat(len(states))[:, None]
    leads = []
    for rows, tokens in zip(torch.split(before, _ROWS), torch.split(wanted, _ROWS), strict=True):
        logits = backbone.next_token_logits(rows)
        tokens = tokens.to(logits.device)
        others = logits.scatter(1, tokens, -torch.inf)
        leads.append((logits.gather(1, tokens)[:, 0] - others.amax(-1)).float())
    return torch.cat(leads).view(len(states), -1).amin(1).cpu()


def words_margin(
    backbone: Backbone, states: torch.Tensor, opening: tuple[int, ...], margins: torch.Tensor
) -> torch.Tensor:
    """`opening_margin` of the texts that the model would refuse; their `margins` without opening.

    Args:
        states: (n, 1 + tokens, hidden), as for `opening_margin`.
        margins: (n,) from `refusal_margin`.

    Returns:
        (n,) float32; those of texts that it would not refuse are as in `margins`.
    """
    words, refusing = margins.clone(), margins > 0
    if opening and refusing.any():
        words[refusing] = opening_margin(backbone, states[refusing], opening)
    return words
