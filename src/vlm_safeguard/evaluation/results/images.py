"""The images that were shown: `images/`, each once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vlm_safeguard.evaluation.asks.ask import Ask
from vlm_safeguard.evaluation.results.lines import Place
from vlm_safeguard.model.conversation import images_of

_FOLDER = "images"


def save_images(asks: Iterable[Ask], out: Path) -> dict[Place, str]:
    """Write them into an evaluation's folder; which ask was shown which, relative to it."""
    (out / _FOLDER).mkdir(exist_ok=True)
    paths: dict[Place, str] = {}
    for ask in asks:
        for image in images_of(ask.chat())[:1]:
            digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            path = f"{_FOLDER}/{digest[:20]}.png"
            if not (out / path).exists():
                image.save(out / path)
            paths[ask.benchmark, ask.condition, ask.sample.id] = path
    return paths
