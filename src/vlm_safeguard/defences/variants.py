"""A guard beside its controls: every claim about the default is shown next to these."""

from __future__ import annotations

from dataclasses import replace

from vlm_safeguard.edits import Project, Restore
from vlm_safeguard.gate import OpenGate
from vlm_safeguard.guard import Guard

_SEED = 0


def variants(guard: Guard) -> dict[str, Guard]:
    """By name: the guard, the restoring edit, and three controls.

    - `default`: the guard as it is;
    - `restore`: its gate, the `restore` edit;
    - `project`: the literal projection h − P h, on every request;
    - `random`: its gate and edit, in a random subspace of the same rank;
    - `flipped`: its gate and edit, pushing the other way.
    """
    return {
        "default": guard,
        "restore": guard.variant(edit=Restore()),
        "project": guard.variant(edit=Project(), gate=OpenGate()),
        "random": guard.variant(random_seed=_SEED),
        "flipped": guard.variant(edit=replace(guard.edit, strength=-guard.edit.strength)),
    }
