"""Conversations with media of noise, as their processor writes them, and the view of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tiny import load_makers
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import noise_media, render_messages
from vlm_safeguard.model.media import Shown
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.policy.text_view import TextView


@cache
def made(model_type: str) -> tuple[Any, TextView]:
    """The processor of a family's small model, and its view."""
    model, processor = load_makers()[model_type]()
    return processor, learn_text_view(processor, Backbone.of(model).placeholder_ids)


def noise_inputs(processor: Any, conversations: Sequence[Sequence[dict[str, Any]]]) -> Any:
    """Left-padded model inputs, each conversation with its own media."""
    shown = [noise_media(processor, list(messages)) for messages in conversations]
    everything = Shown(
        images=[image for each in shown for image in each.images],
        videos=[video for each in shown for video in each.videos],
        audios=[audio for each in shown for audio in each.audios],
    )
    images = [list(each.images) for each in shown]
    inputs = processor(
        text=[render_messages(processor, list(messages)) for messages in conversations],
        images=images if any(images) else None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        **everything.arguments(),
    )
    inputs.pop("video_metadata", None)  # the processor's own: no model takes it
    return inputs
