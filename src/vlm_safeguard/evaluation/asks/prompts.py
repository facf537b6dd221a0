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


@dataclass(frozen=True)
class ImageQuestion:
    """A harmless question that needs an image; `kind` says of what sort it is."""

    id: str
    kind: str
    language: str
    text: str


def read_prompts(kind: str, split: str = "held-out") -> list[Prompt]:
    """The prompts of one kind, in a fixed order.

    Args:
        kind: "harmful" or "harmless"; held out only, also "lookalike" (harmless) and "jailbreak"
            (harmful, to be put into templates).
        split: "held-out", to report on, or "development", to choose on.
    """
    return [Prompt(**record) for record in _records(split, f"{kind}.jsonl")]


def image_questions() -> list[ImageQuestion]:
    """Held-out questions about an image, many of which no model could answer without one."""
    return [ImageQuestion(**record) for record in _records("held-out", "image-questions.jsonl")]


def _records(split: str, name: str) -> list[dict[str, str]]:
    path = files("vlm_safeguard.evaluation.asks").joinpath("prompts", split, name)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
