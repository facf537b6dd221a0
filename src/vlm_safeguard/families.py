"""Model types that are known: what they are called, and which are verified or refused.

A type is verified where the tests ran every check on a small model of it; see `tests/families`.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Attributes by which configs name the tokens that stand for an image.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Family:
    """What has to be known about a model type beyond its structure.

    Attributes:
        placeholders: config attributes that hold the ids standing for an image's patches.
        skipped: attribute of the text config that lists layers which text without images does
            not pass (cross-attention); None where there are none.
    """

    placeholders: tuple[str, ...] = ("image_token_id",)
    skipped: str | None = None


#: Verified model types.
FAMILIES: dict[str, Family] = {
    "llava": Family(),
}

#: Model types that cannot be guarded, and why.
REFUSED: dict[str, str] = {}
