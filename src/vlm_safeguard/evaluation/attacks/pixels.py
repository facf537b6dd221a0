"""An image's pixels as a processor's values, so that gradients reach the image that is written.

Where a processor neither scales nor blends an image, each of its values is an affine function of
one level: value = slope · level + offset. Which level, and which function, is learnt from images
that are shown to it, so that patches, tiles and any normalisation are read alike; it is then
checked on one more image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.conversation import Chat, chat_of, encode_chats, images_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, ProcessorMixin

LEVELS = 256  # of each channel of a pixel
_EXACT = 1e-3  # levels by which a value may miss the pixel that it is read from


@dataclass(frozen=True, eq=False)
class Pixels:
    """The map from levels, 0–255, to one image's values.

    Attributes:
        size: width and height of the images that it holds for.
        source: which level each value is read from, in the order of `levels_of`.
        slope: of each value.
        offset: of each value.
    """

    size: tuple[int, int]
    source: torch.Tensor
    slope: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, processor: ProcessorMixin, image: Image) -> Self:
        """Learn it at a size that the processor leaves alone: its own, or else the image's.

        Raises:
            SafeguardError: at neither size are its values read from single pixels.
        """
        for size in _sizes(processor, image):
            pixels = cls._learn(processor, size)
            if pixels._holds(processor):
                return pixels
        raise SafeguardError(
            f"{type(processor).__name__} scales or blends images of {image.width} × "
            f"{image.height} pixels, so no gradient can be taken to single ones. Attack with "
            "images of a size that it leaves alone (folder:DIR)."
        )

    @classmethod
    def _learn(cls, processor: ProcessorMixin, size: tuple[int, int]) -> Self:
        width, height = size
        count = width * height * 3
        place = torch.arange(count)
        offset = _values(processor, image_of(torch.zeros(count), size))
        white = _values(processor, image_of(torch.full((count,), LEVELS - 1), size))
        slope = (white - offset) / (LEVELS - 1)
        source, weight = torch.zeros(offset.shape, dtype=torch.long), 1
        while weight < count:  # a level is one digit of a pixel's place
            shown = _values(processor, image_of(place // weight % LEVELS, size))
            digit = torch.where(slope == 0, 0.0, (shown - offset) / slope)
            source += digit.nan_to_num().round().long().clamp(0, LEVELS - 1) * weight
            weight *= LEVELS
        return cls(size, source.clamp(max=count - 1), slope, offset)

    def _holds(self, processor: ProcessorMixin) -> bool:
        """Whether an image of noise has the values that it should."""
        noise = torch.randint(
            LEVELS, (self.count,), generator=torch.Generator().manual_seed(0)
        ).double()
        missed = self(noise[None]) - _values(processor, image_of(noise, self.size))
        return bool((missed.abs() <= _EXACT * self.slope.abs().max()).all())

    @property
    def count(self) -> int:
        """Levels of an image."""
        return self.size[0] * self.size[1] * 3

    def __call__(self, levels: torch.Tensor) -> torch.Tensor:
        """The processor's values of a batch of images, one after the other.

        Args:
            levels: (images, count), floating; the result has their dtype.
        """
        slope, offset = (each.to(levels.device, levels.dtype) for each in (self.slope, self.offset))
        values = levels[:, self.source.to(levels.device)] * slope + offset
        return values.flatten(0, 1)

    def levels_of(self, image: Image) -> torch.Tensor:
        """(count,) float32 levels of an image that is scaled to `size`, channels last."""
        scaled = image.convert("RGB").resize(self.size)
        return torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).float()

    def image(self, levels: torch.Tensor) -> Image:
        """An image of (count,) levels, whole numbers from 0 to 255."""
        return image_of(levels, self.size)


def only_image(chat: Chat) -> Image:
    """The one image that is shown in a conversation.

    Raises:
        SafeguardError: there is none, or several.
    """
    shown = images_of(chat)
    if len(shown) != 1:
        raise SafeguardError(
            f"An attack on the pixels needs a request with one image, and this one has "
            f"{len(shown)}; choose another image condition."
        )
    return shown[0]


def image_of(levels: torch.Tensor, size: tuple[int, int]) -> Image:
    """An RGB image of (width · height · 3,) levels, whole numbers from 0 to 255."""
    from PIL import Image

    return Image.frombytes("RGB", size, bytes(levels.to(torch.uint8).cpu().tolist()))


def _sizes(processor: ProcessorMixin, image: Image) -> Iterator[tuple[int, int]]:
    """Sizes that it may leave alone: those that it scales the image to, then the image's own."""
    batch = _encoded(processor, image)
    shape = batch["pixel_values"].shape
    if len(shape) >= 4 and shape[-3] == 3:  # (…, channels, height, width)
        yield shape[-1], shape[-2]
    if "image_grid_thw" in batch:  # patches in a row, as Qwen2-VL has them
        side: int = processor.image_processor.patch_size  # type: ignore[attr-defined]
        _, height, width = batch["image_grid_thw"][0].tolist()
        yield width * side, height * side
    yield image.size


def _values(processor: ProcessorMixin, image: Image) -> torch.Tensor:
    values: torch.Tensor = _encoded(processor, image)["pixel_values"]
    return values.double()


def _encoded(processor: ProcessorMixin, image: Image) -> BatchFeature:
    return encode_chats(processor, [chat_of("?", image)])
