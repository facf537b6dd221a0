"""How much longer a guarded model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.conversation import chat_of
from vlm_safeguard.timing import generation_ratio

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.vlm import VLM

_PROMPTS = 4  # of each kind in the batch that is timed


class TimeRatio(BaseModel):
    """Guarded over unguarded seconds: the median, the lowest and the highest round."""

    model_config = ConfigDict(frozen=True)

    median: float
    low: float
    high: float


def time_ratio(vlm: VLM, guard: Guard) -> TimeRatio:
    """Of one batch of held-out prompts, harmful and harmless, with a blank image."""
    prompts = [
        prompt.text for kind in ("harmful", "harmless") for prompt in read_prompts(kind)[:_PROMPTS]
    ]
    inputs = vlm.encode([chat_of(prompt, blank_image()) for prompt in prompts])
    ratio = generation_ratio(vlm.model, inputs, guard)
    return TimeRatio(median=ratio.median, low=ratio.low, high=ratio.high)
