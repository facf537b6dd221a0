"""`gap.json`: the safety alignment gap as points in a plane, and how legible harm is by layer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Point = Annotated[list[FiniteFloat], Field(min_length=2)]


class Groups(BaseModel):
    """Points of the requests of each kind, all of one length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    harmful: Annotated[list[Point], Field(min_length=2)]
    harmless: Annotated[list[Point], Field(min_length=2)]


class GapRecord(BaseModel):
    """`gap.json`: last-token states in the plane of the text-only states' principal components.

    The first component is the first coordinate; the text-only states' mean is the origin.

    Attributes:
        layer: whose last-token states these are, 0 being the first decoder layer.
        condition: the image condition of `unguarded` and `guarded`.
        text: the requests without an image.
        unguarded: the same with an image.
        guarded: the same with an image and the guard.
        auroc: by condition (`text`, `blank`, …), the AUROC of the harm score in every layer of
            the unguarded model; empty where it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    layer: int
    condition: str
    text: Groups
    unguarded: Groups
    guarded: Groups
    auroc: dict[str, list[FiniteFloat]] = {}

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        lengths = {
            len(point)
            for groups in (self.text, self.unguarded, self.guarded)
            for point in (*groups.harmful, *groups.harmless)
        }
        if len(lengths) > 1:
            raise ValueError(f"points of {sorted(lengths)} coordinates cannot share a plane")
        return self
