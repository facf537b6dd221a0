"""Image conditions: what is shown beside a request."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.images import opened
from vlm_safeguard.evaluation.asks.samples import Sample
from vlm_safeguard.evaluation.asks.typography import INSTRUCTION, typeset
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.conversation import Chat, chat_of
from vlm_safeguard.pocket.scenes import HELD_OUT_SEED, Scene

if TYPE_CHECKING:
    from PIL.Image import Image

#: "image" is a rendered scene; "own" the benchmark's image. Besides, "folder:DIR" takes the
#: images of a folder in turn.
CONDITIONS = ("text", "blank", "noise", "image", "own", "typographic")
FOLDER = "folder:"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def illustrated(sample: Sample, number: int, condition: str) -> Chat:
    """One sample as it is asked under a condition: its request, and what is shown beside it.

    Args:
        number: its place in the benchmark, which noise, scenes and a folder's images depend on.

    Raises:
        SafeguardError: there is no such condition, or no image for it.
    """
    if condition == "typographic":
        return chat_of(INSTRUCTION, typeset(sample.text))
    if condition == "own":
        if sample.image is None:
            raise SafeguardError(
                f"The sample '{sample.id}' has no image of its own; choose another condition: "
                f"{', '.join(name for name in CONDITIONS if name != 'own')} or {FOLDER}DIR."
            )
        return chat_of(sample.beside or sample.text, opened(sample.image))
    if condition.startswith(FOLDER):
        images = folder_images(condition.removeprefix(FOLDER))
        return chat_of(sample.text, opened(images[number % len(images)]))
    image = condition_image(condition, number)
    return chat_of(sample.text) if image is None else chat_of(sample.text, image)


def condition_image(condition: str, number: int) -> Image | None:
    """The image that goes with prompt `number`; None for text alone.

    Blank is the same white image each time; noise and rendered scenes differ from prompt to
    prompt and from everything seen in training and fitting.

    Raises:
        SafeguardError: there is no such condition.
    """
    if condition == "text":
        return None
    if condition == "blank":
        return blank_image()
    if condition == "noise":
        return noise_image(HELD_OUT_SEED + number)
    if condition == "image":
        return Scene.from_seed(HELD_OUT_SEED + number).render()
    raise SafeguardError(
        f"There is no image condition '{condition}'; choose of {', '.join(CONDITIONS)} or "
        f"{FOLDER}DIR."
    )


@cache
def folder_images(folder: str) -> tuple[Path, ...]:
    """The images of a folder, by name; other files are not looked at.

    Raises:
        SafeguardError: there is no such folder, or no image in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise SafeguardError(f"There is no folder {path} to take images from.")
    images = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES))
    if not images:
        raise SafeguardError(f"The folder {path} holds no images ({', '.join(_SUFFIXES)}).")
    return images
