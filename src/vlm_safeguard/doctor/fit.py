"""Whether the guard that was given is for this model."""

from __future__ import annotations

from vlm_safeguard.doctor.subject import Subject, require
from vlm_safeguard.guard import template_sha256
from vlm_safeguard.policy.soundness import check_sound


def guard_fits(subject: Subject) -> str:
    """The guard was fitted on this model, with this chat template."""
    guard, backbone = subject.guard, subject.backbone
    check_sound(guard.policy)
    guard.check_fits(backbone)
    require(
        guard.fingerprint.tolerances is not None,
        "it is of format 3, which knows its model by embeddings alone. Fit it again.",
    )
    guard.check_behaves(backbone)
    require(
        guard.provenance.chat_template_sha256 == template_sha256(subject.processor),
        "it was fitted with another chat template than this processor's. Fit it again.",
    )
    return f"fitted on {guard.provenance.model_name}, same structure, weights and chat template"
