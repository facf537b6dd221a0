"""Whose turn it is: runs of a guarded model under several threads, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vlm_safeguard.errors import SafeguardError

_LOOK = 0.1  # seconds between looks at whether a guard is still there


class Turns:
    """Lets one thread at a time run a model, and stops a run once the guard is to come off.

    Attributes:
        leaving: whether no pass may begin any more.
    """

    def __init__(self) -> None:
        """It is nobody's turn."""
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        self.leaving = False

    @property
    def mine(self) -> bool:
        """Whether it is this thread's turn."""
        return self._owner == threading.get_ident()

    def take(self, still_there: Callable[[], bool] = lambda: True) -> None:
        """Wait for other threads' runs to end; then it is this thread's turn until `give`.

        Args:
            still_there: whether waiting is of any use.

        Raises:
            SafeguardError: it is not any more.
        """
        while not self._lock.acquire(timeout=_LOOK):
            if not still_there():
                raise SafeguardError(
                    "The guard came off while this call waited for its turn (its block was "
                    "left), so nothing is generated. Attach again."
                )
        self._owner = threading.get_ident()
        self._depth += 1

    def give(self) -> None:
        """End this thread's turn, if it is its own."""
        if not self.mine:
            return
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    def check_may_go_on(self) -> None:
        """Refuse a pass that begins after the guard's block was left.

        Raises:
            SafeguardError: so that the run stops before its next token.
        """
        if self.leaving:
            raise SafeguardError(
                "The guard's block was left while this run was going on, so it was stopped before "
                "its next token. Wait for the thread before leaving the block, or attach with "
                "wait=True."
            )
