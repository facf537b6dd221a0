"""ECSO, "eyes closed, safety on" (arXiv 2403.09572): look again without the image.

The model answers with the image (eq. 1), says whether its own answer is harmful (eq. 2), and if so
describes the image with the request in view (eq. 3) and answers from that text alone (eq. 4).
Prompts are in our own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_safeguard.defences.defence import Answer, generate_answers
from vlm_safeguard.defences.verdict import yes_log_odds
from vlm_safeguard.model.conversation import (
    Chat,
    chat_of,
    images_of,
    rephrased,
    request_text,
    unseen,
)

if TYPE_CHECKING:
    from vlm_safeguard.model.vlm import VLM

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
    """Two to four passes; a conversation without an image is answered as it is.

    The model judges and describes in conversations of their own, about the last request and all
    images; what was said before it is there again when it answers with its eyes closed.

    Attributes:
        threshold: log-odds of "harmful" above which the eyes are closed.
        caption_tokens: the longest description, in tokens.
    """

    threshold: float = 0.0
    caption_tokens: int = 64

    name: ClassVar[str] = "ecso"

    def generate(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        """See `Defence.generate`."""
        answers = generate_answers(vlm, chats, **options)
        with_image = [row for row, chat in enumerate(chats) if images_of(chat)]
        if not with_image:
            return answers

        def about(row: int, words: str, **more: str) -> Chat:
            question = words.format(request=request_text(chats[row]), **more)
            return chat_of(question, *images_of(chats[row]))

        questions = [about(row, _HARMFUL, answer=answers[row].text) for row in with_image]
        odds = yes_log_odds(vlm, questions)
        harmful = [
            row for row, value in zip(with_image, odds, strict=True) if value > self.threshold
        ]
        if not harmful:
            return answers
        captions = generate_answers(
            vlm,
            [about(row, _DESCRIBE) for row in harmful],
            max_new_tokens=self.caption_tokens,
        )
        blind = [
            rephrased(
                unseen(chats[row]),
                _EYES_CLOSED.format(caption=caption.text, request=request_text(chats[row])),
            )
            for row, caption in zip(harmful, captions, strict=True)
        ]
        again = generate_answers(vlm, blind, **options)
        for row, answer in zip(harmful, again, strict=True):
            answers[row] = answer
        return answers
