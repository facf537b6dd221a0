"""The project's own held-out prompts: harmful and harmless requests, and image questions.

They share no topic with the anchors, the calibration requests or the Pocket VLM's training data.
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


def read_prompts(name: str) -> list[Prompt]:
    """The held-out prompts called `name`, "harmful" or "harmless", in a fixed order."""
    path = files("vlm_safeguard.evaluation").joinpath("prompts", f"{name}.jsonl")
    return [Prompt(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
