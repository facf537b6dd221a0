"""What is examined: the model, its decoder, the versions, and the guard."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from vlm_safeguard.doctor.subject import Subject
from vlm_safeguard.guard import Guard, template_sha256

_PACKAGES = ("vlm-safeguard", "torch", "transformers")


def facts_of(subject: Subject) -> dict[str, Any]:
    """As plain values.

    Raises:
        SafeguardError: no decoder is found in the model.
    """
    model, backbone = subject.model, subject.backbone
    facts: dict[str, Any] = {
        "model": str(model.config._name_or_path or type(model).__name__),
        "type": model.config.model_type,
        "architecture": type(model).__name__,
        "device": str(backbone.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoder": backbone.decoder_path,
        "layers": len(backbone.layers),
        "hidden size": backbone.hidden_size,
        "image tokens": sorted(backbone.placeholder_ids),
        "chat template": template_sha256(subject.processor),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    return facts if subject.given is None else {**facts, "guard": _facts_of_guard(subject.given)}


def _facts_of_guard(guard: Guard) -> dict[str, Any]:
    policy, provenance = guard.policy, guard.provenance
    return {
        "fitted on": provenance.model_name,
        "layers": list(policy.layers),
        "rank": policy.rank,
        "edit": policy.edit.name,
        "gate": [criterion.name for criterion in policy.gate],
        "chat template": provenance.chat_template_sha256,
        "versions": provenance.versions,
    }
