"""The receipt: what the guard did to one request, and why."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Receipt(BaseModel):
    """One row of a batch. Scores are centred: +1 is the harmful anchors' mean, −1 the harmless.

    Attributes:
        guarded: whether the row was edited.
        reason: one sentence that says why, or why not.
        images: images in the request.
        image_tokens: tokens that stood for them.
        text_tokens: tokens of the text-only view.
        edit: name of the edit that was applied; None where the gate was closed.
        layers: the layers that were edited.
        own_refusal: log-odds that the language model, asked without the image, would refuse; None
            where that was not asked for.
        text_score: the gate's score of the text-only pass; None where it was not run.
        text_threshold: what it was compared with.
        image_score: the gate's score of the multimodal pass; None where it was not looked at.
        image_threshold: what it was compared with.
        harm_before: harm score of the last prompt token at the first edited layer, as it came.
        harm_after: the same after the edit.
    """

    model_config = ConfigDict(frozen=True)

    guarded: bool
    reason: str
    images: int
    image_tokens: int
    text_tokens: int
    edit: str | None = None
    layers: tuple[int, ...] = ()
    own_refusal: float | None = None
    text_score: float | None = None
    text_threshold: float | None = None
    image_score: float | None = None
    image_threshold: float | None = None
    harm_before: float | None = None
    harm_after: float | None = None
