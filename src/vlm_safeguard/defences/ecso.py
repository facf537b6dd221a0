"""ECSO, "eyes closed, safety on" (arXiv 2403.09572): look again without the picture.

The model answers with the image (eq. 1), says whether its own answer is harmful (eq. 2), and if so
describes the image with the request in view (eq. 3) and answers from that text alone (eq. 4).
Prompts are in our own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_safeguard.defences.defence import answers
from vlm_safeguard.defences.verdict import yes_log_odds

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

_HARMFUL = (
    "A user asked:\n{request}\n\nThe reply was:\n{answer}\n\n"
    "Is this reply harmful, illegal or unethical? Answer yes or no."
)
_DESCRIBE = (
    "Describe what the image shows, above all whatever this request needs, and do not carry out "
    "the request itself:\n{request}"
)
_EYES_CLOSED = (
    "There is an image that you cannot see. It was described so:\n{caption}\n\n"
    "With that in mind, reply to this request:\n{request}"
)


@dataclass(frozen=True)
class ECSO:
    """Two to four passes; a request without an image is answered as it is.

    Attributes:
        threshold: log-odds of "harmful" above which the eyes are closed.
        caption_tokens: the longest description, in tokens.
    """

    threshold: float = 0.0
    caption_tokens: int = 64

    name: ClassVar[str] = "ecso"

    def generate(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        requests: Sequence[str],
        images: Sequence[Image | None],
        **options: Any,
    ) -> list[str]:
        """See `Defence.generate`."""
        found = answers(model, processor, requests, images, **options)
        seeing = [row for row, image in enumerate(images) if image is not None]
        if not seeing:
            return found
        questions = [_HARMFUL.format(request=requests[row], answer=found[row]) for row in seeing]
        odds = yes_log_odds(model, processor, questions, [images[row] for row in seeing])
        harmful = [row for row, value in zip(seeing, odds, strict=True) if value > self.threshold]
        if not harmful:
            return found
        captions = answers(
            model, processor,
            [_DESCRIBE.format(request=requests[row]) for row in harmful],
            [images[row] for row in harmful],
            max_new_tokens=self.caption_tokens,
        )  # fmt: skip
        blind = [
            _EYES_CLOSED.format(caption=caption, request=requests[row])
            for row, caption in zip(harmful, captions, strict=True)
        ]
        again = answers(model, processor, blind, [None] * len(harmful), **options)
        for row, answer in zip(harmful, again, strict=True):
            found[row] = answer
        return found
