"""The images that were shown: `images/`, each once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.evaluation.asks.ask import Ask
from vlm_safeguard.evaluation.results.lines import Place
from vlm_safeguard.model.conversation import images_of

if TYPE_CHECKING:
    from PIL.Image import Image

_FOLDER = "images"


def save_images(asks: Iterable[Ask], out: Path) -> dict[Place, str]:
    """Write them into an evaluation's folder; which ask was shown which, relative to it."""
    paths: dict[Place, str] = {}
    for ask in asks:
        for image in images_of(ask.chat())[:1]:
            paths[ask.benchmark, ask.condition, ask.sample.id] = save_image(image, out)
    return paths


def save_image(image: Image, out: Path) -> str:
    """Write one into an evaluation's folder, without loss, and say where, relative to it."""
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    path = f"{_FOLDER}/{digest[:20]}.png"
    if not (out / path).exists():
        (out / _FOLDER).mkdir(parents=True, exist_ok=True)
        image.save(out / path)
    return path
