"""The frontier: how attack success trades against over-refusal as a guard's settings move."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.gate import ImageScore, TextScore

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
        guard = guard.variant(edit=replace(guard.policy.edit, strength=strength))
    if threshold is not None:
        criteria = guard.policy.gate
        if not any(isinstance(criterion, TextScore) for criterion in criteria):
            names = ", ".join(criterion.name for criterion in criteria)
            raise SafeguardError(f"The gate ({names}) has no threshold to move.")
        moved = [
            criterion.model_copy(update={"threshold": criterion.threshold + threshold})
            if isinstance(criterion, TextScore | ImageScore)
            else criterion
            for criterion in criteria
        ]
        guard = guard.variant(gate=tuple(moved))
    return guard
