"""The guard of an evaluation's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.models import ModelName, loaded_vlm
from vlm_safeguard.guard import Guard
from vlm_safeguard.loading import load_guard

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.plan import Plan


def prepare_guard(plan: Plan, folder: Path) -> Guard:
    """Put the plan's guard, or one fitted now, into an evaluation's folder.

    Raises:
        SafeguardError: the folder holds answers made with another guard.
    """
    guard_folder = folder / "guard"
    origin = guard_folder / "origin.json"
    model = ModelName(plan.model, plan.loading)
    source = json.dumps([*model.weights, plan.guard])
    if origin.is_file():
        if origin.read_text("utf-8") != source:
            raise SafeguardError(
                f"{folder} holds an evaluation of another model or guard; name a new folder."
            )
        return Guard.from_pretrained(guard_folder)
    vlm = loaded_vlm(model)
    guard = load_guard(plan.guard, plan.model, vlm.model, vlm.processor)
    guard.check_fits(vlm.backbone)
    guard.save_pretrained(guard_folder)
    origin.write_text(source, "utf-8")  # last: a folder that has it is whole
    return guard
