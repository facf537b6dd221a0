"""A batch's `generate`, which can stand still between two tokens while another one goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic

from vlm_safeguard.serving.jobs import Job


class Run:
    """One batch in a thread of its own; it moves only while it has its turn.

    Attributes:
        jobs: of the batch.
        generate: answers them.
        steps: tokens of each answer since the turn began.
        seconds: of all its turns.
        is_over: whether it has no more turns to come.
        error: what ended it; None where it ended well.
    """

    def __init__(self, jobs: Sequence[Job], generate: Callable[[Run], None]) -> None:
        """Not begun yet.

        Args:
            generate: answers the jobs of a run.
        """
        self.jobs = jobs
        self.steps, self.seconds = 0, 0.0
        self.is_over = False
        self.error: Exception | None = None
        self.generate = generate
        self._turn, self._still = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, name="answering", daemon=True)

    def go_on(self) -> None:
        """Have a turn; returns once it stands still."""
        started, self.steps = monotonic(), 0
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._still.acquire()
        self.seconds += monotonic() - started

    def stand_still(self) -> None:
        """From its own thread: end this turn, and wait for the next one."""
        self._still.release()
        self._turn.acquire()

    def _work(self) -> None:
        try:
            self.generate(self)
        except Exception as error:  # of the guard, of the model or of the machine
            self.error = error
        finally:
            self.is_over = True
            self._still.release()
