"""Images that mean nothing: what the gap is shown with, and what gates are calibrated with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 224  # pixels


def blank_image() -> Image:
    """A white RGB picture."""
    from PIL import Image

    return Image.new("RGB", (_SIDE, _SIDE), "white")


def noise_image(seed: int) -> Image:
    """A picture of independent uniform noise, the same for the same seed."""
    import random

    from PIL import Image

    pixels = random.Random(seed).randbytes(_SIDE * _SIDE * 3)
    return Image.frombytes("RGB", (_SIDE, _SIDE), pixels)
