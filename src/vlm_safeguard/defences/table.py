"""All defences that are compared, by name, in the order of the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlm_safeguard.defences.canned import Canned
from vlm_safeguard.defences.cmrm import CMRM
from vlm_safeguard.defences.defence import Defence
from vlm_safeguard.defences.ecso import ECSO
from vlm_safeguard.defences.guarded import Guarded
from vlm_safeguard.defences.inferaligner import InferAligner
from vlm_safeguard.defences.prompts import ADASHIELD, GOAL_PRIORITY, NONE, SELF_REMINDER
from vlm_safeguard.defences.shiftdc import ShiftDC
from vlm_safeguard.defences.variants import VARIANTS
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard


def _variant(name: str) -> Callable[[Guard], Defence]:
    return lambda guard: Guarded(VARIANTS[name](guard), name)


_TABLE: dict[str, Callable[[Guard], Defence]] = {
    "none": lambda guard: NONE,
    "self-reminder": lambda guard: SELF_REMINDER,
    "goal-priority": lambda guard: GOAL_PRIORITY,
    "adashield-s": lambda guard: ADASHIELD,
    "ecso": lambda guard: ECSO(),
    "inferaligner": InferAligner.of,
    "cmrm": CMRM.of,
    "shiftdc": ShiftDC.of,
    "canned": Canned.of,
    **{name: _variant(name) for name in VARIANTS},
}
NAMES = tuple(_TABLE)


def defences(guard: Guard, names: Sequence[str] | None = None) -> dict[str, Defence]:
    """Defences by name; all in the order of the table, or those named, in the order given.

    Args:
        guard: fitted on the model that is defended; baselines take its anchors' statistics.

    Raises:
        SafeguardError: a name is not in the table.
    """
    names = NAMES if names is None else names
    for name in names:
        if name not in _TABLE:
            raise SafeguardError(f"There is no defence '{name}'; there are {', '.join(NAMES)}.")
    return {name: _TABLE[name](guard) for name in names}
