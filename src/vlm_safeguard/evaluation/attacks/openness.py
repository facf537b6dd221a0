"""How far a guard's gate is open for a text, as a search can lower it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_safeguard.model.activations import capture_last_token
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.own_refusal import ScoredRefusal
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.refusal import first_token_margin

_SCORE = 8.0  # logits that a unit of score weighs: harmful requests lead by some 8, and score 1
_BELOW = 0.1  # of a lead that a closed gate still counts, so that the model refuses less, too


def openness(
    backbone: Backbone,
    policy: Policy,
    texts: Sequence[Sequence[int]],
    alone: Sequence[bool],
) -> torch.Tensor:
    """(texts,) by how much each text opens the gate, with gradients; below 0 where it does not.

    It sums, in logits, by how much a refusal counts and by how much the score is above its
    threshold, as either alone opens. A refusal counts by how much its first token leads, or by how
    much the score is above where refusals begin to count, if that is less. Words of refusals are
    not read: a gate that they leave closed is counted as open.

    Args:
        texts: token ids, ready for the answer; each is read as it is.
        alone: whether each is a sentence of a request.
    """
    with capture_last_token(backbone) as states:
        final = backbone.run_text(texts)[:, -1]
    device = final.device
    told = None if policy.discriminant is None else policy.discriminant.to(device)
    reading = Reading(states, policy.directions.to(device), policy.layers, discriminant=told)
    total = final.new_zeros(len(texts), dtype=torch.float32)
    if (own := policy.own_refusal) is not None:
        lead = first_token_margin(backbone.next_token_logits(final), own.tokens)
        if isinstance(own, ScoredRefusal):
            above = own.text_score(reading) - _least(own, alone).to(device)
            lead = torch.minimum(lead, (_SCORE * above).clamp(min=-_SCORE))
        total = total + lead.clamp(min=0) + _BELOW * lead.clamp(max=0)
    if (text := policy.text_criterion) is not None:
        total = total + _SCORE * (text.score(reading)[:, 0] - text.threshold).clamp(min=0)
    return total


def _least(own: ScoredRefusal, alone: Sequence[bool]) -> torch.Tensor:
    """(texts,) the score above which a refusal of each counts, if in the usual words."""
    floor = -torch.inf if own.score_floor is None else own.score_floor
    of_sentences = torch.inf if own.alone_above is None else own.alone_above
    return torch.tensor([of_sentences if sentence else floor for sentence in alone])
