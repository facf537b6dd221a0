"""The frontier: how attack success trades against over-refusal as a guard's settings move."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.gate import CalibratedGate

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard


def tuned(guard: Guard, *, strength: float | None = None, threshold: float | None = None) -> Guard:
    """A guard with one of its settings moved.

    Args:
        strength: of the edit, in place of its own (λ).
        threshold: what is added to the gate's thresholds, of the text and of the image, in units
            of the harm score: the harmful anchors' mean lies 2 above the harmless ones'.

    Raises:
        SafeguardError: the gate has no thresholds.
    """
    if strength is not None:
        guard = guard.variant(edit=replace(guard.edit, strength=strength))
    if threshold is not None:
        gate = guard.gate
        if not isinstance(gate, CalibratedGate):
            raise SafeguardError(f"The gate '{gate.name}' has no threshold to move.")
        moved: dict[str, float] = {"text_threshold": gate.text_threshold + threshold}
        if gate.image_threshold is not None:
            moved["image_threshold"] = gate.image_threshold + threshold
        guard = guard.variant(gate=gate.model_copy(update=moved))
    return guard
