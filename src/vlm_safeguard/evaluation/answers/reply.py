"""A reply: one answer and what it took to make it; and the line that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.results.lines import KeptReceipt, Line
from vlm_safeguard.timing import now

if TYPE_CHECKING:
    from vlm_safeguard.defences.defence import Answer
    from vlm_safeguard.evaluation.asks.ask import AskRecord
    from vlm_safeguard.model.conversation import Chat


class Reply(BaseModel):
    """One answer of a batch.

    Attributes:
        tokens: of the answer, up to and with the one that ends it.
        batch: answers in its batch.
        seconds: that its batch took, shared out among the answers; None where defences share work,
            so that none has a time of its own.
        receipt: what the guard did, where one was attached.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    tokens: int
    batch: int
    seconds: float | None = None
    receipt: KeptReceipt | None = None

    @classmethod
    def of(cls, answer: Answer, *, batch: int, seconds: float | None = None) -> Self:
        """The reply that a defence's answer is."""
        receipt = None
        if answer.receipt is not None:
            receipt = KeptReceipt(**answer.receipt.model_dump(mode="json"))
        return cls(
            text=answer.text, tokens=answer.tokens, batch=batch, seconds=seconds, receipt=receipt
        )


def timed_replies(
    generate: Callable[[Sequence[Chat]], list[Answer]], chats: Sequence[Chat]
) -> list[Reply]:
    """Replies to one batch of conversations, one each."""
    start = now()
    answers = generate(chats)
    seconds = (now() - start) / len(chats)
    return [Reply.of(answer, batch=len(chats), seconds=seconds) for answer in answers]


def line_of(
    ask: AskRecord,
    sample: str,
    defence: str,
    reply: Reply,
    *,
    verdicts: Mapping[str, Verdict] | None = None,
    correct: bool | None = None,
) -> Line:
    """A line of `samples.jsonl`.

    Args:
        sample: the request's name in its benchmark.
        verdicts: by judge, of a request.
        correct: whether a utility question was answered right.
    """
    return Line(
        benchmark=ask.benchmark,
        sample=sample,
        kind=ask.kind,
        category=ask.category,
        condition=ask.condition,
        image=None if ask.attempt is None else ask.attempt.image,
        attempt=ask.attempt,
        defence=defence,
        request=ask.request,
        answer=reply.text,
        tokens=reply.tokens,
        seconds=reply.seconds,
        receipt=reply.receipt,
        verdicts=dict(verdicts or {}),
        correct=correct,
    )
