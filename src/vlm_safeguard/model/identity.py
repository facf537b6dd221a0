"""Whether a model is built as the one that a guard was fitted on: structure and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.adapters import active_adapters
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.artifact import Provenance
from vlm_safeguard.policy.policy import Policy


def check_structure(backbone: Backbone, provenance: Provenance, policy: Policy) -> None:
    """Refuse a model of another type, shape or image tokens.

    Raises:
        SafeguardError: what differs.
    """
    present = {
        "model_type": backbone.model.config.model_type,
        "hidden_size": backbone.hidden_size,
        "num_layers": len(backbone.layers),
        "decoder_path": backbone.decoder_path,
    }
    check_same(present, provenance)
    view = policy.text_view
    if backbone.placeholder_ids != view.placeholder_ids:
        raise SafeguardError(
            f"This guard knows image tokens {sorted(view.placeholder_ids)}, the "
            f"model uses {sorted(backbone.placeholder_ids)}. Fit a guard for this model."
        )


def check_same(present: Mapping[str, object], provenance: Provenance) -> None:
    """Refuse a model of which a fact is another than the provenance's field of the same name.

    Raises:
        SafeguardError: the first that differs.
    """
    for name, value in present.items():
        fitted = getattr(provenance, name)
        if fitted != value:
            raise SafeguardError(
                f"This guard was fitted on {provenance.model_name}, whose {name} is "
                f"{fitted}; this model's is {value}. Fit a guard for this model."
            )


def check_adapters(backbone: Backbone, provenance: Provenance) -> None:
    """Refuse a model in which other adapters act.

    Raises:
        SafeguardError: which, and what to do.
    """
    adapters = active_adapters(backbone.model)
    if adapters != provenance.adapters:
        raise SafeguardError(
            f"This guard was fitted with {_listed(provenance.adapters)}; in this model "
            f"{_listed(adapters)} acts. Switch to what it was fitted with, or fit a guard for the "
            "model as it is."
        )


def _listed(adapters: Sequence[str]) -> str:
    return f"the adapter {' and '.join(map(repr, adapters))}" if adapters else "no adapter"
