"""Refusing a model that other code has changed since a guard was attached to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_unchanged(
    model: PreTrainedModel,
    backbone: Backbone,
    handles: Sequence[Any],
    placed: tuple[torch.device, torch.dtype],
) -> None:
    """Refuse a model whose guard's hooks are gone, or that trains, moved or was cast.

    Args:
        handles: of the hooks on the model and its decoder; none once the guard is off.
        placed: device and dtype when it was attached to.

    Raises:
        SafeguardError: what changed.
    """
    there = {
        *model._forward_pre_hooks,
        *model._forward_hooks,
        *backbone.decoder._forward_pre_hooks,
    }
    if not handles or not {handle.id for handle in handles} <= there:
        raise SafeguardError(
            "The guard's hooks on the model are gone (its block was left, or they were removed by "
            "other code), so nothing is generated. Attach again."
        )
    if model.training or backbone.decoder.training:
        raise SafeguardError("The model is in training mode; call model.eval() first.")
    if (backbone.device, model.dtype) != placed:
        raise SafeguardError(
            "The model was moved or cast after attaching, so nothing is generated. Attach again."
        )
