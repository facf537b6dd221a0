"""The judges that are models, in the roles by which scorers ask for them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from inspect_ai.model import CachePolicy, GenerateConfig, Model, get_model

from vlm_safeguard.evaluation.answers.provider import PROVIDER
from vlm_safeguard.evaluation.judges.scorers import GRADER, MODERATOR

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.plan import Plan


def model_roles(plan: Plan, out: Path) -> dict[str, str | Model]:
    """Role → model; one that runs here is loaded as the plan's own model is.

    Defences give the same answers where they do not act. Each is judged once in a folder.
    """
    names = {
        MODERATOR: plan.moderator and f"{PROVIDER}/{plan.moderator}",
        GRADER: plan.grader if "rubric" in plan.judge_names else None,
    }
    once = GenerateConfig(cache=CachePolicy(per_epoch=False, scopes={"folder": str(out)}))
    return {role: _model(name, plan, once) for role, name in names.items() if name is not None}


def _model(name: str, plan: Plan, config: GenerateConfig) -> Model:
    if not name.startswith(f"{PROVIDER}/"):
        return get_model(name, config=config)
    loading = asdict(plan.loading.for_another_model())
    return get_model(name, config=config, batch_size=plan.batch_size, **loading)
