"""What inspect-ai finds by the entry point `inspect_ai`: the models, the tasks and the scorers."""

from __future__ import annotations

from vlm_safeguard.evaluation.answers.provider import SafeguardAPI
from vlm_safeguard.evaluation.judges.scorers import llama_guard, refusal, right, rubric, shares
from vlm_safeguard.evaluation.tasks import TASKS

__all__ = ["TASKS", "SafeguardAPI", "llama_guard", "refusal", "right", "rubric", "shares"]
