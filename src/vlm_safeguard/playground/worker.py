"""The one thread that runs the model: what is asked waits in line, and is told as it comes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.playground.events import Event, Failed

_log = logging.getLogger("vlm_safeguard.playground")


class _Left(Exception):  # noqa: N818 - not an error
    """Nobody waits for the work any more; it ends the run that it is raised in."""


class Worker:
    """Runs one piece of work at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "model")

    async def events(
        self, work: Callable[[Callable[[Event], None]], None]
    ) -> AsyncGenerator[Event, None]:
        """What a piece of work tells, as it comes; leaving early stops it at what it tells next.

        Args:
            work: is given the function to tell with. What it raises is told as `Failed`.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        left = threading.Event()

        def put(event: Event | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        def tell(event: Event) -> None:
            if left.is_set():
                raise _Left
            put(event)

        def run() -> None:
            try:
                if not left.is_set():
                    work(tell)
            except _Left:
                return
            except SafeguardError as error:
                put(Failed(str(error)))
            except Exception as error:  # of the model, its processor or the machine
                _log.exception("a request failed")
                put(Failed(f"The model could not answer this ({type(error).__name__})."))
            put(None)

        self._pool.submit(run)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            left.set()

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
