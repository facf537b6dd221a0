"""Images from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from PIL.Image import Image


def load_image(path: Path) -> Image:
    """An RGB image from a file.

    Raises:
        SafeguardError: no such file, or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise SafeguardError(f"There is no image {path}.") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        reason = str(error) or type(error).__name__
        raise SafeguardError(f"{path} cannot be read as an image: {reason}") from error
