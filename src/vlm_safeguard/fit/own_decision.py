"""How the model itself refuses, and what the gate's criterion of that measures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.refusal import (
    declined_prefix_margins,
    prefix_margins,
    read_opening,
    refusal_margins,
    refusal_prefix,
    refusal_tokens,
)
from vlm_safeguard.policy.calibration import OwnDecision, slack_of
from vlm_safeguard.policy.choice import TextStates
from vlm_safeguard.policy.options import FitOptions


def measure_own_decision(
    backbone: Backbone, rows: Sequence[Sequence[int]], texts: TextStates, options: FitOptions
) -> OwnDecision | None:
    """None where its first token says too little.

    The model must refuse far more of the harmful anchors than of the calibration requests.

    Args:
        rows: token ids of the harmful anchors, and of whatever else behind them.
    """
    harmful, harmless, ordinary = texts.final
    tokens = refusal_tokens(backbone, harmful, harmless, options.refusal_likelier)
    if not tokens:
        return None
    refused = refusal_margins(backbone, harmful, tokens) > 0
    declined = refusal_margins(backbone, ordinary, tokens) > 0
    contrast = refused.float().mean() - declined.float().mean()
    if contrast < options.refusal_contrast or not refused.any():
        return None
    places = refused.nonzero()[: options.refusal_anchors, 0].tolist()
    prompts = [tuple(rows[i]) for i in places]
    read = backbone.read_texts(prompts)
    prefix = refusal_prefix(backbone, read, prompts, options.prefix_tokens)
    shown = torch.ones(len(prompts))
    if prefix:
        behind = backbone.go_on(read, prompts, prefix)
        states = torch.cat([read.final[:, None], behind], dim=1)
        shown = prefix_margins(backbone, states, prefix, shown)
    return OwnDecision(tokens, prefix, slack_of(shown, options.prefix_fence))


def own_measures(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    final: torch.Tensor,
    own: OwnDecision,
) -> torch.Tensor:
    """(texts, 2) the leads of a refusal's first token and of its least likely word, in logits.

    Args:
        rows: token ids of the requests.
        final: (texts, hidden) final states of the requests, as `text_states` returns them, then of
            their sentences, whose words are not read; theirs are the leads of the first token.
    """
    opening = read_opening(backbone, final[: len(rows)], own.tokens, own.prefixes)
    words = declined_prefix_margins(backbone, rows, opening)
    margins = refusal_margins(backbone, final[len(rows) :], own.tokens)
    return torch.stack([torch.cat([opening.margin, margins]), torch.cat([words, margins])], dim=1)
