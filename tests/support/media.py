"""Batches of conversations with media of noise, as their processor writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_safeguard.model.conversation import noise_media, render_messages
from vlm_safeguard.model.media import Shown


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
