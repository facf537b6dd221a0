"""The project's own prompts: requests of several kinds, to choose on and to report on.

The held-out ones share no topic with the development prompts, the anchors, the calibration
requests or the Pocket VLM's training data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Prompt:
    """A request; `topic` is the word that no other data of the project may hold."""

    id: str
    category: str
    topic: str
    text: str


def read_prompts(kind: str, split: str = "held-out") -> list[Prompt]:
    """The prompts of one kind, in a fixed order.

    Args:
        kind: "harmful" or "harmless"; held out only, also "lookalike" (harmless) and "jailbreak"
            (harmful, to be put into templates).
        split: "held-out", to report on, or "development", to choose on.
    """
    path = files("vlm_safeguard.evaluation.asks").joinpath("prompts", split, f"{kind}.jsonl")
    return [Prompt(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
