"""ShiftDC (arXiv 2502.13095): take the image's shift along the safety direction back.

The request is also read with a caption in place of its image. The shift that the image causes,
m = h(image) − h(caption), loses its component along s, the difference of the harmful and harmless
anchors' mean states: ĥ = h(image) − proj_s(m). Prompts are in our own words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from vlm_safeguard.defences.defence import Answer, generate_answers
from vlm_safeguard.defences.steering import steered
from vlm_safeguard.model.activations import capture_last_token
from vlm_safeguard.model.conversation import (
    Chat,
    chat_of,
    encode_chats,
    images_of,
    rephrased,
    request_text,
    unseen,
)

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.vlm import VLM

_DESCRIBE = "Describe the image."
_CAPTIONED = "Image: {caption}\n\n{request}"


@dataclass(frozen=True, eq=False)
class ShiftDC:
    """A caption, a text-only pass, and the corrected pass with the image.

    A conversation without an image is answered as it is; several images share a caption.

    Attributes:
        direction: (layers, hidden) harmful less harmless mean state, of every decoder layer.
        layers: those that are corrected, at the last prompt token.
        caption_tokens: the longest caption, in tokens.
    """

    direction: torch.Tensor
    layers: tuple[int, ...]
    caption_tokens: int = 64

    name: ClassVar[str] = "shiftdc"

    @classmethod
    def of(cls, guard: Guard, *, caption_tokens: int = 64) -> Self:
        """With a fitted guard's means and layers."""
        means = guard.policy.directions
        return cls(means.harmful_mean - means.harmless_mean, guard.policy.layers, caption_tokens)

    @torch.no_grad()
    def generate(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        """See `Defence.generate`."""
        with_image = [row for row, chat in enumerate(chats) if images_of(chat)]
        if not with_image:
            return generate_answers(vlm, chats, **options)
        captions = generate_answers(
            vlm,
            [chat_of(_DESCRIBE, *images_of(chats[row])) for row in with_image],
            max_new_tokens=self.caption_tokens,
        )
        texts = []
        for row, caption in zip(with_image, captions, strict=True):
            words = _CAPTIONED.format(caption=caption.text, request=request_text(chats[row]))
            alone = encode_chats(vlm.processor, [rephrased(unseen(chats[row]), words)])
            texts.append(alone["input_ids"][0].tolist())
        backbone = vlm.backbone
        with capture_last_token(backbone) as text:
            backbone.run_text(texts)
        corrections = {
            layer: self._correcting(layer, len(chats), with_image, text[layer])
            for layer in self.layers
        }
        with steered(backbone, corrections):
            return generate_answers(vlm, chats, **options)

    def _correcting(
        self, layer: int, count: int, rows: list[int], text: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """What corrects the last token of these of `count` rows, in the prompts' pass only."""
        passes = iter((True,))

        def correct(states: torch.Tensor) -> torch.Tensor:
            if not next(passes, False):
                return states  # tokens of the answer are left alone
            out = states.clone()
            beams = out.view(count, -1, *out.shape[1:])  # as many of each row
            beams[rows, :, -1] = without_shift(
                beams[rows, :, -1], text[:, None], self.direction[layer]
            )
            return out

        return correct


def without_shift(
    states: torch.Tensor, text: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """ĥ = h − s sᵀ(h − t) / ‖s‖²: states whose shift from `text` lost its part along s.

    Args:
        states: (…, hidden) with the image, h.
        text: (…, hidden) with the caption, t.
        direction: (hidden,) safety direction, s, of any length.

    Returns:
        (…, hidden), in the states' dtype.
    """
    exact = torch.promote_types(states.dtype, torch.float32)
    s = torch.nn.functional.normalize(direction.to(states.device, exact), dim=0)
    shift = states.to(exact) - text.to(states.device, exact)
    return (states.to(exact) - (shift @ s)[..., None] * s).to(states.dtype)
