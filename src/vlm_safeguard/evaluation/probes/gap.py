"""The safety alignment gap: last-token states, reduced to the plane that `gap.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.evaluation.results.gap import GapRecord, Groups
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.activations import image_states, text_states
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.policy.directions import auroc as auroc_of
from vlm_safeguard.policy.response import Response

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.vlm import VLM

_GAP, _AUROC = 25, 100  # prompts of each kind in the plane, and behind the AUROC


@dataclass(frozen=True)
class Gap:
    """Last-token states at one layer: (harmful, harmless), each (n, hidden)."""

    layer: int
    text: tuple[torch.Tensor, torch.Tensor]
    unguarded: tuple[torch.Tensor, torch.Tensor]
    guarded: tuple[torch.Tensor, torch.Tensor]


@torch.inference_mode()
def gap_states(vlm: VLM, guard: Guard, harmful: Sequence[str], harmless: Sequence[str]) -> Gap:
    """States at the last edited layer: text only, with a blank image, and edited beside it."""
    backbone, processor = vlm.backbone, vlm.processor
    layer = guard.policy.layers[-1]
    requests = [*harmful, *harmless]
    blanks = [blank_image()] * len(requests)

    def split(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return states[: len(harmful), layer], states[len(harmful) :, layer]

    text = split(text_states(backbone, [encode_chat(processor, each) for each in requests])[0])
    unguarded = split(image_states(backbone, processor, requests, blanks))
    with guard.variant(response=Response.EDIT).attach(vlm.model):
        guarded = split(image_states(backbone, processor, requests, blanks, label="guarded"))
    return Gap(layer, text, unguarded, guarded)


def held_out_gap(vlm: VLM, guard: Guard) -> GapRecord:
    """The gap that a blank image opens on held-out prompts, and the AUROC of harm by layer."""
    harmful, harmless = (
        [prompt.text for prompt in read_prompts(kind)[:_AUROC]] for kind in ("harmful", "harmless")
    )
    requests = [*harmful, *harmless]
    blanks = [blank_image()] * len(requests)
    states = {
        "text": text_states(vlm.backbone, [encode_chat(vlm.processor, each) for each in requests])[
            0
        ],
        "blank": image_states(vlm.backbone, vlm.processor, requests, blanks),
    }
    scores = {name: guard.policy.directions.harm_scores(each) for name, each in states.items()}
    return gap_record(
        gap_states(vlm, guard, harmful[:_GAP], harmless[:_GAP]),
        "blank",
        {
            name: auroc_of(each[: len(harmful)], each[len(harmful) :]).tolist()
            for name, each in scores.items()
        },
    )


def gap_record(
    gap: Gap, condition: str, auroc: Mapping[str, Sequence[float]] | None = None
) -> GapRecord:
    """`gap` reduced to the plane of its text-only states, to four decimals.

    Args:
        condition: the image condition of the states with an image.
        auroc: by condition, the AUROC of the harm score in every layer.
    """
    centre, plane = principal_plane(gap.text)

    def points(states: tuple[torch.Tensor, torch.Tensor]) -> Groups:
        harmful, harmless = (
            [[round(x, 4) for x in point] for point in ((s - centre) @ plane.mT).tolist()]
            for s in states
        )
        return Groups(harmful=harmful, harmless=harmless)

    return GapRecord(
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
