"""Images as files: checked when a benchmark is read, opened when a request is made."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from PIL.Image import Image


def checked(path: Path, where: str) -> Path:
    """The path, if an image is there.

    Only its header is read: `opened` finds what is wrong behind it.

    Args:
        where: what the image belongs to, for messages.

    Raises:
        SafeguardError: there is no such file, or it is no image.
    """
    from PIL import Image

    if not path.is_file():
        raise SafeguardError(f"{where}: its image {path} is missing.")
    try:
        with Image.open(path):
            return path
    except (OSError, Image.DecompressionBombError) as error:
        raise SafeguardError(f"{where}: {path} cannot be read as an image: {error}") from error


def opened(image: Image | Path) -> Image:
    """An RGB copy of an image, upright as its EXIF data has it.

    Raises:
        SafeguardError: the file cannot be read as an image.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Path):
        return image.convert("RGB")
    try:
        with Image.open(image) as stored_image:
            return ImageOps.exif_transpose(stored_image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SafeguardError(f"{image} cannot be read as an image: {error}") from error


def stored(content: bytes) -> Path:
    """An image's bytes as a file in the Hub's cache, named after them, written once."""
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("vlm-safeguard", namespace="images")
    path = folder / hashlib.sha256(content).hexdigest()
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    return path


def data_url(image: Image) -> str:
    """An image as `data:image/png;base64,…`, without loss."""
    kept = io.BytesIO()
    image.save(kept, "png")
    return f"data:image/png;base64,{base64.b64encode(kept.getvalue()).decode()}"
