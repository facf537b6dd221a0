"""A reply: one answer, and what it took to make it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.timing import now

if TYPE_CHECKING:
    from vlm_safeguard.defences.defence import Answer
    from vlm_safeguard.model.conversation import Chat


class Reply(BaseModel):
    """One answer of a batch.

    Attributes:
        tokens: of the answer, up to and with the one that ends it.
        seconds: that its batch took, shared out among the answers.
        batch: answers in its batch.
        receipt: what the guard did, where one was attached.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    tokens: int
    seconds: float
    batch: int
    receipt: Receipt | None = None


def timed_replies(
    generate: Callable[[Sequence[Chat]], list[Answer]], chats: Sequence[Chat]
) -> list[Reply]:
    """Replies to one batch of conversations, one each."""
    start = now()
    answers = generate(chats)
    seconds = (now() - start) / len(chats)
    return [
        Reply(
            text=answer.text,
            tokens=answer.tokens,
            seconds=seconds,
            batch=len(chats),
            receipt=answer.receipt,
        )
        for answer in answers
    ]
