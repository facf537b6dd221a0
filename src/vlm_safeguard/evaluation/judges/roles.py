"""The judges that are models, in the roles by which scorers ask for them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from inspect_ai.model import Model, get_model

from vlm_safeguard.evaluation.answers.provider import PROVIDER
from vlm_safeguard.evaluation.judges.scorers import GRADER, MODERATOR

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.plan import Plan


def model_roles(plan: Plan) -> dict[str, str | Model]:
    """Role → model; one that runs here is loaded as the plan's own model is."""
    names = {
        MODERATOR: plan.moderator and f"{PROVIDER}/{plan.moderator}",
        GRADER: plan.grader if "rubric" in plan.judge_names else None,
    }
    return {role: _model(name, plan) for role, name in names.items() if name is not None}


def _model(name: str, plan: Plan) -> Model:
    if not name.startswith(f"{PROVIDER}/"):
        return get_model(name)
    loading = asdict(plan.loading.for_another_model())
    return get_model(name, batch_size=plan.batch_size, **loading)
