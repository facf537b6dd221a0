"""The receipt: what the guard did to one request, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.policy.edits import Edit
from vlm_safeguard.policy.gate import AnyGate, CalibratedGate


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
        own_refusal: by how many logits a refusal's opening leads the language model's other next
            tokens, asked without the image; None where that was not asked for.
        own_opening: where it leads, by how many logits each token of what most refusals open with
            does, at the least; above 0 the model would say just that, above −1 nearly.
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
    own_opening: float | None = None
    text_score: float | None = None
    text_threshold: float | None = None
    image_score: float | None = None
    image_threshold: float | None = None
    harm_before: float | None = None
    harm_after: float | None = None

    @classmethod
    def of(
        cls,
        facts: Mapping[str, Any],
        gate: AnyGate,
        edit: Edit,
        *,
        window: tuple[int, ...],
        layers: tuple[int, ...],
        editable: bool,
    ) -> Self:
        """The receipt of a row, from what was counted and scored in it.

        Args:
            facts: values of the fields that were measured, by name.
            window: the layers that the guard may edit, of which `layers` were.
            editable: whether the edit acts on such requests at all.
        """
        limits: dict[str, Any] = {}
        if isinstance(gate, CalibratedGate):
            if "text_score" in facts:
                limits["text_threshold"] = gate.text_threshold
            if "image_score" in facts:
                limits["image_threshold"] = gate.image_threshold
        if editable:
            reason = _why(facts, gate, f"{len(layers)} of {len(window)} layers")
        else:
            reason = f"no image in the request, and '{edit.name}' only mends what an image does"
        return cls(
            **facts,
            **limits,
            guarded=bool(layers),
            reason=reason,
            edit=edit.name if layers else None,
            layers=layers,
        )


def _why(facts: Mapping[str, Any], gate: AnyGate, where: str) -> str:
    """Why the gate decided as it did."""
    if isinstance(gate, CalibratedGate):
        text, image = facts["text_score"], facts.get("image_score")
        own = facts.get("own_refusal", -1.0)
        if gate.heeds(own, facts.get("own_opening", own), text):
            return "asked without an image, the language model would itself refuse"
        if own > 0 and text <= gate.text_threshold:
            return (
                "asked without an image, the language model would decline, but not for harm: the "
                f"text scores {text:+.2f}"
            )
        if text > gate.text_threshold:
            return f"the text scores {text:+.2f}, above {gate.text_threshold:+.2f}"
        if image is not None and image > gate.image_threshold:
            return f"with its image it scores {image:+.2f}, above {gate.image_threshold:+.2f}"
        return f"the text scores {text:+.2f}, not above {gate.text_threshold:+.2f}"
    if gate.name == "open":
        return "the gate is always open"
    return f"the paper's gate is open in {where}"
