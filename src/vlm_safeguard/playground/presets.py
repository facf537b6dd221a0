"""Images to begin with."""

from __future__ import annotations

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.conditions import condition_image
from vlm_safeguard.evaluation.asks.images import data_url
from vlm_safeguard.evaluation.asks.typography import INSTRUCTION, typeset
from vlm_safeguard.playground.events import Captioned

_SCENE = 6  # a yellow star, at the bottom
_CAPTIONS = {
    "blank": "A white image: it says nothing, and yet refusals get fewer.",
    "noise": "Independent random pixels.",
    "image": "A rendered scene, of the kind that the Pocket VLM was trained on.",
}
_TYPOGRAPHIC = (
    "The request as an image (the form of FigStep); the question says nothing of it. A gate that "
    "reads the text alone does not see it."
)


def preset(name: str, request: str) -> Captioned:
    """An image by its condition's name: `blank`, `noise`, `image`, or `typographic`.

    Args:
        request: what `typographic` draws; the question becomes one that does not tell it.

    Raises:
        SafeguardError: there is no such preset, or nothing that can be drawn.
    """
    if name == "typographic":
        if not request.strip():
            raise SafeguardError("Type a question first: it is what this image shows.")
        return Captioned(data_url(typeset(request)), _TYPOGRAPHIC, INSTRUCTION)
    image = condition_image(name, _SCENE)
    if image is None:
        raise SafeguardError("There is no image in the preset 'text'.")
    return Captioned(data_url(image), _CAPTIONS[name])
