"""Images that mean nothing: what the gap is shown with, and what gates are calibrated with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 224  # pixels


def blank_image() -> Image:
    """A white RGB image."""
    from PIL import Image

    return Image.new("RGB", (_SIDE, _SIDE), "white")


def noise_image(seed: int) -> Image:
    """An image of independent uniform noise, the same for the same seed."""
    import random

    from PIL import Image

    pixels = random.Random(seed).randbytes(_SIDE * _SIDE * 3)
    return Image.frombytes("RGB", (_SIDE, _SIDE), pixels)


def drawn_image(seed: int) -> Image:
    """A few coloured ellipses and boxes on a pale ground, the same for the same seed."""
    import random

    from PIL import Image, ImageDraw

    rng = random.Random(seed)

    def colour(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randint(low, high) for _ in range(3))

    image = Image.new("RGB", (_SIDE, _SIDE), colour(200, 255))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 6)):
        x, y = (rng.randint(0, _SIDE - 20) for _ in range(2))
        width, height = (rng.randint(20, _SIDE // 2) for _ in range(2))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + width, y + height), fill=colour(0, 220))
    return image


def meaningless_image(number: int) -> Image:
    """A blank, a noisy or a drawn image in turn."""
    return (blank_image(), noise_image(number), drawn_image(number))[number % 3]
