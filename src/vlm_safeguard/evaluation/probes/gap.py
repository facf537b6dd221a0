"""`gap.json`: the safety alignment gap as points in a plane, and how legible harm is by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.demo import Gap

Point = Annotated[list[FiniteFloat], Field(min_length=2)]


class Groups(BaseModel):
    """Points of the requests of each kind, all of one length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    harmful: Annotated[list[Point], Field(min_length=2)]
    harmless: Annotated[list[Point], Field(min_length=2)]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, length) harmful and harmless points."""
        return torch.tensor(self.harmful), torch.tensor(self.harmless)


class GapRecord(BaseModel):
    """`gap.json`.

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

    @classmethod
    def of(
        cls, gap: Gap, condition: str, auroc: Mapping[str, Sequence[float]] | None = None
    ) -> Self:
        """`gap` reduced to the plane of its text-only states, to four decimals."""
        centre, plane = principal_plane(gap.text)

        def points(states: tuple[torch.Tensor, torch.Tensor]) -> Groups:
            harmful, harmless = (
                [[round(x, 4) for x in point] for point in ((s - centre) @ plane.mT).tolist()]
                for s in states
            )
            return Groups(harmful=harmful, harmless=harmless)

        return cls(
            layer=gap.layer,
            condition=condition,
            text=points(gap.text),
            unguarded=points(gap.unguarded),
            guarded=points(gap.guarded),
            auroc={name: [round(x, 4) for x in values] for name, values in (auroc or {}).items()},
        )


def principal_plane(text: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre (hidden,) and first two principal components (2, hidden) of harmful and harmless.

    Turned so that the harmful mean lies to the right, whatever signs the SVD gave.
    """
    both = torch.cat(text)
    centre = both.mean(0)
    _, _, axes = torch.linalg.svd(both - centre, full_matrices=False)
    plane = axes[:2]
    if ((text[0] - centre) @ plane[0]).mean() < ((text[1] - centre) @ plane[0]).mean():
        plane = -plane
    return centre, plane
