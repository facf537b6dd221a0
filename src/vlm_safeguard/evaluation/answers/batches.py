"""Requests that come one by one, answered in batches by a thread.

The thread has a plain queue and hands out `concurrent.futures`; neither knows an event loop, so a
second loop (inspect retries a task in a new one) does not wait for the first. One thread serves
the process: models share the machine, and what one of them takes is not another's doing.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

IDLE = 0.2  # seconds without a new request, after which a batch goes as it is
PATIENCE = 5.0  # the same for a batch of which it is known how many requests it will have

#: Answers a batch of payloads, in order; each as plain JSON values.
Run = Callable[[list[Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Place:
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
        line: what may share a batch: the same model, defence and options.
        run: answers a batch of this line.
        most: requests in a batch at most.
        place: where it stands; None where that is not known.
        journal: where its answer is kept.
    """

    payload: Any
    line: Hashable
    run: Run
    most: int
    place: Place | None = None
    journal: Journal | None = None
    answer: Future[dict[str, Any]] = field(default_factory=Future)

    @property
    def batch(self) -> Hashable:
        """Which batch it belongs to."""
        if self.place is None:
            return self.line, None
        return self.line, self.place.of, self.place.number // self.most

    @property
    def full(self) -> int:
        """How many requests make its batch complete."""
        if self.place is None:
            return self.most
        return min(self.most, self.place.total - self.place.number // self.most * self.most)

    @property
    def key(self) -> str | None:
        """What its answer is kept under."""
        if self.place is None:
            return None
        return f"{self.line}\n{self.place.of}\n{self.place.number}"


class Journal:
    """A file of answers, one batch a line, each on the disk before any of it is used.

    A batch is there whole or not at all, so a run that goes on after a crash makes the very
    batches that were left.
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that was cut off is dropped."""
        self.path = path
        self._answers: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.is_file():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._answers.update(json.loads(line))
                    whole += len(line)
            os.truncate(path, whole)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer kept under a key."""
        return self._answers.get(key)

    def add(self, answers: dict[str, dict[str, Any]]) -> None:
        """Keep a batch's answers."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(answers).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._answers.update(answers)


_QUEUE: SimpleQueue[Request] = SimpleQueue()
_START = threading.Lock()
_thread: threading.Thread | None = None


def submit(request: Request) -> Future[dict[str, Any]]:
    """Have a request answered; the future holds the answer, or what went wrong."""
    global _thread
    if request.journal is not None and request.key is not None:
        known = request.journal.get(request.key)
        if known is not None:
            request.answer.set_result(known)
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
            (IDLE if b[0].place is None else PATIENCE for b in waiting.values()), default=None
        )
        try:
            request = _QUEUE.get(timeout=patience)
        except Empty:
            first = next(
                (name for name, b in waiting.items() if b[0].place is None), next(iter(waiting))
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
    batch.sort(key=lambda request: request.place.number if request.place else 0)
    if not batch:
        return
    found: list[dict[str, Any] | Exception] = []
    try:
        found += _run(batch)
    except Exception as error:  # whatever it is, the requests are told
        if len(batch) == 1:
            found = [error]
        else:
            for request in batch:
                try:
                    found += _run([request])
                except Exception as own:
                    found.append(own)
    kept: dict[Journal, dict[str, dict[str, Any]]] = {}
    for request, answer in zip(batch, found, strict=True):
        if request.journal is not None and request.key is not None and isinstance(answer, dict):
            kept.setdefault(request.journal, {})[request.key] = answer
    try:
        for journal, answers in kept.items():
            journal.add(answers)
    except OSError as error:  # a full disk: nothing is used that was not kept
        found = [error] * len(batch)
    for request, answer in zip(batch, found, strict=True):
        if isinstance(answer, dict):
            request.answer.set_result(answer)
        else:
            request.answer.set_exception(answer)


def _run(batch: Sequence[Request]) -> list[dict[str, Any]]:
    found = batch[0].run([request.payload for request in batch])
    if len(found) != len(batch):
        raise RuntimeError(f"{len(found)} answers to {len(batch)} requests")
    return found
