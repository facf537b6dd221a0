"""A job as the event loop sees it: its events come in, and who leaves takes it back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from vlm_safeguard.serving.errors import ApiError, too_late
from vlm_safeguard.serving.jobs import Event

T = TypeVar("T")


class LeftError(Exception):
    """The client is gone."""


class Exchange:
    """Events of one job, which another thread sends; until a point in time."""

    def __init__(self, deadline: float) -> None:
        """Ends at `deadline`, in seconds of the running loop's clock."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._deadline = deadline

    def send(self, event: Event) -> None:
        """From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits
            return

    async def next(self) -> Event:
        """The next event.

        Raises:
            ApiError: it is one, or there is none in time.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            raise too_late() from None
        if isinstance(event, ApiError):
            raise event
        return event


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """What is awaited, while the client waits for it, too.

    Raises:
        LeftError: it does not any more.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise LeftError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
