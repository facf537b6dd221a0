"""A guard beside its variants and controls: claims about the default are shown next to these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.directions import whole_space
from vlm_safeguard.policy.edits import Add, Project, Refuse, Restore
from vlm_safeguard.policy.gate import GATES, Thresholded
from vlm_safeguard.policy.response import Response

_SEED = 0

#: By name, what makes a variant of a fitted guard:
#: - `default`: the guard as it is;
#: - `vlm-guard-project`, `vlm-guard-add`: the projection and h + P h(q), as the paper writes them,
#:   behind its uncentred gate, for each layer by itself;
#: - `project`: the literal projection h − P h, on every request;
#: - `restore`, `refuse`: its gate, that edit;
#: - `text`, `refusal`: its gate; an open request is answered from its text alone, in `refusal` with
#:   the model's own words of refusal first;
#: - `text-always`: without its gate, every request is answered from its text alone;
#: - `rank-1`, `rank-8`: its gate and edit, in so many directions;
#: - `rank-full`: likewise, in all dimensions of a state;
#: - `random`: its gate and edit, in a random subspace of the same rank;
#: - `flipped`: its gate and edit, pushing the other way.
VARIANTS: dict[str, Callable[[Guard], Guard]] = {
    "default": lambda guard: guard,
    "vlm-guard-project": lambda guard: _editing(guard, edit=Project(), gate=GATES["paper"]),
    "vlm-guard-add": lambda guard: _editing(guard, edit=Add(), gate=GATES["paper"]),
    "project": lambda guard: _editing(guard, edit=Project(), gate=GATES["open"]),
    "restore": lambda guard: _editing(guard, edit=Restore()),
    "refuse": lambda guard: _editing(guard, edit=Refuse()),
    "text": lambda guard: guard.variant(response=Response.TEXT),
    "refusal": lambda guard: guard.variant(response=Response.REFUSAL),
    "text-always": lambda guard: guard.variant(response=Response.TEXT, gate=GATES["open"]),
    "rank-1": lambda guard: _editing(guard, rank=1),
    "rank-8": lambda guard: _editing(guard, rank=8),
    "rank-full": lambda guard: _editing(
        guard, directions=(whole := whole_space(guard.policy.directions)), rank=whole.rank
    ),
    "random": lambda guard: _editing(guard, random_seed=_SEED),
    "flipped": lambda guard: _editing(
        guard, edit=replace(guard.policy.edit, strength=-guard.policy.edit.strength)
    ),
}
#: Those that the demo shows.
SHOWN = ("default", "refuse")


def _editing(guard: Guard, **changes: Any) -> Guard:
    """A variant that edits open requests beside their images, as VLM-Guard does."""
    return guard.variant(response=Response.EDIT, **changes)


def variants(guard: Guard, names: Sequence[str] = SHOWN) -> dict[str, Guard]:
    """Variants of a guard, by name; see `VARIANTS`."""
    return {name: VARIANTS[name](guard) for name in names}


def tuned(guard: Guard, *, strength: float | None = None, threshold: float | None = None) -> Guard:
    """A guard with one of its settings moved.

    Args:
        strength: of the edit, in place of its own (λ).
        threshold: what is added to the gate's thresholds, of the text and of the image, in units
            of their scores: the harmful anchors' mean lies 2 above the harmless ones'.

    Raises:
        SafeguardError: the guard does not edit, or its gate has no thresholds.
    """
    if strength is not None:
        if not guard.policy.edits:
            raise SafeguardError(
                "The guard edits nothing, so there is no strength to set; leave 'strength' out, or "
                "name a guard whose response is 'edit'."
            )
        guard = guard.variant(edit=replace(guard.policy.edit, strength=strength))
    if threshold is not None:
        criteria = guard.policy.gate
        if guard.policy.text_criterion is None:
            names = ", ".join(criterion.name for criterion in criteria)
            raise SafeguardError(f"The gate ({names}) has no threshold to move.")
        moved = [
            criterion.model_copy(update={"threshold": criterion.threshold + threshold})
            if isinstance(criterion, Thresholded)
            else criterion
            for criterion in criteria
        ]
        guard = guard.variant(gate=tuple(moved))
    return guard
