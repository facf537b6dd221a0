"""What the generating thread is given, and what it sends back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from vlm_safeguard.engines.hooks.judgement import Judgement
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.serving.errors import ApiError, going_down
from vlm_safeguard.serving.prompts import Prompt
from vlm_safeguard.serving.requests import Sampling


@dataclass(frozen=True)
class Decided:
    """The gate has decided; it comes before anything of an answer."""

    receipt: Receipt


@dataclass(frozen=True)
class Piece:
    """More text of an answer."""

    choice: int
    text: str


@dataclass(frozen=True)
class Over:
    """An answer is at its end.

    Attributes:
        ids: all its tokens.
    """

    choice: int
    reason: Literal["stop", "length"]
    ids: tuple[int, ...]


Event = Decided | Piece | Over | ApiError


@dataclass(eq=False)
class Job:
    """One request to generate answers.

    Attributes:
        count: how many.
        limit: tokens of each at most; 0 where the gate's decision is all that is asked for.
        stops: texts before which an answer ends.
        send: hands an event to whoever asked; may be called from any thread.
        cancelled: whether nobody waits for it any more.
        begun: whether an event was sent.
        left: answers that are not over.
        opened: what the gate decided, where it is open and the text alone is answered.
    """

    prompt: Prompt
    sampling: Sampling
    count: int
    limit: int
    stops: tuple[str, ...]
    send: Callable[[Event], None]
    cancelled: bool = False
    begun: bool = False
    left: int = field(init=False)
    opened: Judgement | None = None

    def __post_init__(self) -> None:
        self.left = self.count

    @property
    def group(self) -> Hashable:
        """What may share a batch: equal sampling, and images that are read in all or none.

        Random numbers are drawn for a whole batch, so a request with a seed has one to itself.
        """
        seeded = self.sampling.seed is not None and self.sampling.temperature != 0
        return self.sampling, self.reads_images, id(self) if seeded else None

    @property
    def reads_images(self) -> bool:
        """Whether it is answered beside images."""
        return bool(self.prompt.images) and self.opened is None

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens of the prompt that it is answered from."""
        return self.prompt.ids if self.opened is None else self.opened.text

    @property
    def beginning(self) -> tuple[int, ...]:
        """Tokens that each answer begins with; one more at least is the model's."""
        return () if self.opened is None else self.opened.beginning[: self.limit - 1]

    def tell(self, event: Event) -> None:
        """Send an event."""
        self.begun = True
        self.left -= isinstance(event, Over)
        self.send(event)


class Waiting:
    """Jobs in the order they came, taken in batches by one thread."""

    def __init__(self, most: int, patience: float) -> None:
        """Batches of `most` answers, which wait for `patience` seconds to fill."""
        self._most, self._patience = most, patience
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Have a job done.

        Raises:
            ApiError: nothing new is begun.
        """
        with self._changed:
            if self._closed:
                raise going_down()
            self._jobs.append(job)
            self._changed.notify()

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Have jobs that were taken done before all others."""
        with self._changed:
            self._jobs.extendleft(reversed(jobs))

    def close(self) -> None:
        """Take no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def batch(self, *, wait: bool) -> list[Job]:
        """The oldest job with those of its group that came next; none where none waits.

        Args:
            wait: for one, and for others to join it; then none is the end: no more are taken.
        """
        with self._changed:
            if not wait:
                return self._take()
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._jobs:
                    self._fill()
                    if taken := self._take():
                        return taken
                elif self._closed:
                    return []

    def _fill(self) -> None:
        end = monotonic() + self._patience
        while not self._closed and sum(job.count for job in self._jobs) < self._most:
            if (left := end - monotonic()) <= 0 or not self._changed.wait(left):
                return

    def _take(self) -> list[Job]:
        taken: list[Job] = []
        kept: deque[Job] = deque()
        room = self._most
        for job in self._jobs:
            if job.cancelled:
                continue
            if job.count <= room and (not taken or job.group == taken[0].group):
                taken.append(job)
                room -= job.count
            else:
                kept.append(job)
        self._jobs = kept
        return taken
