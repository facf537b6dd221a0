"""Proving, before anything is generated, that hooks on a model's layers act on its output."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

import torch

from vlm_safeguard.engines.canary import canary_rows, pushed, silent_layers
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    backbone: Backbone,
    hooks: LayerHooks,
    policy: Policy,
    directions: Directions,
) -> None:
    """Refuse a model on which the hooks of a watched layer do not act.

    Args:
        directions: the policy's, on the model's device.

    Raises:
        SafeguardError: a hook did not fire, or what it did had no effect on the logits.
    """
    watched = policy.watched
    ids = torch.full((canary_rows(watched), 2), backbone.text_token, device=backbone.device)

    def push(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        direction = directions.vectors[layer, 0].to(hidden.device)
        return pushed(hidden, watched.index(layer), direction)

    keep = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    hooks.arm(watched, push)
    try:
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep
        ).logits[:, -1]
        hooks.check_all_took_part(watched, "the pass that verifies them")
    finally:
        hooks.disarm()
    if silent := silent_layers(logits, watched):
        raise SafeguardError(
            f"The guard's hooks on layers {silent} of {backbone.decoder_path} do not act on the "
            "model's output, so it was not attached and nothing is generated."
        )
