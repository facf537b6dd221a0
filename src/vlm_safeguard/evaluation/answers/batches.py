"""Requests that come one by one, answered in batches by a thread.

The thread has a plain queue and hands out `concurrent.futures`; neither knows an event loop, so a
second loop (inspect retries a task in a new one) does not wait for the first. One thread serves
the process: models share the machine, and what one of them takes is not another's doing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from vlm_safeguard.evaluation.answers.journal import Journal
from vlm_safeguard.evaluation.answers.reply import Reply

if TYPE_CHECKING:
    from vlm_safeguard.model.conversation import Chat

IDLE = 0.2  # seconds without a new request, after which a batch goes as it is
PATIENCE = 5.0  # the same for a batch of which it is known how many requests it will have

#: Answers a batch of conversations, in order.
Run = Callable[[list["Chat"]], list[Reply]]


@dataclass(frozen=True)
class Position:
    """Where a request stands in a set, which says who it shares a batch with.

    With it batches do not depend on who comes first, so that neither do the answers: rounding
    differs with what a row is batched with.

    Attributes:
        of: the set's name.
        number: from 0.
        total: requests in the set.
    """

    of: str
    number: int
    total: int


@dataclass(frozen=True, eq=False)
class Request:
    """One request to answer.

    Attributes:
        chat: what is to be answered.
        group: what may share a batch: the same model, defence and options.
        run: answers a batch of this group.
        most: requests in a batch at most.
        position: where it stands; None where that is not known.
        journal: where its answer is kept.
        answer: its reply, or what went wrong.
    """

    chat: Chat
    group: Hashable
    run: Run
    most: int
    position: Position | None = None
    journal: Journal | None = None
    answer: Future[Reply] = field(default_factory=Future)

    @property
    def batch(self) -> Hashable:
        """Which batch it belongs to."""
        if self.position is None:
            return self.group, None
        return self.group, self.position.of, self.position.number // self.most

    @property
    def full(self) -> int:
        """How many requests make its batch complete."""
        if self.position is None:
            return self.most
        return min(self.most, self.position.total - self.position.number // self.most * self.most)

    @property
    def key(self) -> str | None:
        """What its answer is kept under."""
        if self.position is None:
            return None
        return f"{self.group}\n{self.position.of}\n{self.position.number}"


_QUEUE: SimpleQueue[Request] = SimpleQueue()
_START = threading.Lock()
_thread: threading.Thread | None = None


def submit(request: Request) -> Future[Reply]:
    """Have a request answered; the future holds the reply, or what went wrong."""
    global _thread
    if request.journal is not None and request.key is not None:
        known = request.journal.get(request.key)
        if known is not None:
            request.answer.set_result(Reply.model_validate(known))
            return request.answer
    with _START:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_serve, name="vlm-safeguard batches", daemon=True)
            _thread.start()
    _QUEUE.put(request)
    return request.answer


def _serve() -> None:
    """Collect batches and answer each once it is full, or once nothing more comes."""
    waiting: dict[Hashable, list[Request]] = {}
    while True:
        patience = min(
            (IDLE if b[0].position is None else PATIENCE for b in waiting.values()), default=None
        )
        try:
            request = _QUEUE.get(timeout=patience)
        except Empty:
            first = next(
                (name for name, b in waiting.items() if b[0].position is None), next(iter(waiting))
            )
            _answer(waiting.pop(first))
            continue
        batch = waiting.setdefault(request.batch, [])
        batch.append(request)
        if len(batch) >= request.full:
            _answer(waiting.pop(request.batch))


def _answer(batch: list[Request]) -> None:
    """Answer a batch; where that fails, each request by itself, so that one harms no other."""
    batch = [request for request in batch if request.answer.set_running_or_notify_cancel()]
    batch.sort(key=lambda request: request.position.number if request.position else 0)
    if not batch:
        return
    answers = _attempt(batch)
    try:
        _keep(batch, answers)
    except OSError as error:  # a full disk: nothing is used that was not kept
        answers = [error] * len(batch)
    for request, answer in zip(batch, answers, strict=True):
        if isinstance(answer, Reply):
            request.answer.set_result(answer)
        else:
            request.answer.set_exception(answer)


def _attempt(batch: Sequence[Request]) -> list[Reply | Exception]:
    """A reply to each request, or why there is none."""
    try:
        replies = batch[0].run([request.chat for request in batch])
        if len(replies) != len(batch):
            raise RuntimeError(f"{len(replies)} answers to {len(batch)} requests")
    except Exception as error:  # whatever it is, the requests get it
        if len(batch) == 1:
            return [error]
        return [answer for request in batch for answer in _attempt([request])]
    return [*replies]


def _keep(batch: Sequence[Request], answers: Sequence[Reply | Exception]) -> None:
    """Write replies to the journals of their requests, those of one journal at once."""
    kept: dict[Journal, dict[str, dict[str, object]]] = {}
    for request, answer in zip(batch, answers, strict=True):
        if request.journal is not None and request.key is not None and isinstance(answer, Reply):
            kept.setdefault(request.journal, {})[request.key] = answer.model_dump(mode="json")
    for journal, replies in kept.items():
        journal.add(replies)
