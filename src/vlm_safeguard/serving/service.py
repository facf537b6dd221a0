"""What every endpoint works with, and how it has the generating thread answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.concurrency import run_in_threadpool
from PIL.Image import Image

from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.serving.engine import Engine
from vlm_safeguard.serving.errors import ApiError, going_down, too_late
from vlm_safeguard.serving.exchange import Exchange
from vlm_safeguard.serving.images import ImageReader
from vlm_safeguard.serving.jobs import Job
from vlm_safeguard.serving.messages import Conversation
from vlm_safeguard.serving.metrics import Metrics
from vlm_safeguard.serving.prompts import Prompt, Writer
from vlm_safeguard.serving.requests import Sampling
from vlm_safeguard.serving.settings import ServeSettings
from vlm_safeguard.serving.tracing import Tracing

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Service:
    """One server's parts."""

    settings: ServeSettings
    engine: Engine
    images: ImageReader
    metrics: Metrics
    tracing: Tracing

    @property
    def policy(self) -> Policy:
        """What guards the model.

        Raises:
            ApiError: it is not ready.
        """
        if self.engine.guard is None:
            raise going_down()
        return self.engine.guard.policy

    @property
    def writer(self) -> Writer:
        """Writes prompts.

        Raises:
            ApiError: it is not ready.
        """
        if not self.engine.ready or self.engine.writer is None:
            raise going_down()
        return self.engine.writer

    def check_model(self, name: str | None) -> None:
        """Refuse another model than the one that is served.

        Raises:
            ApiError: it is another.
        """
        if name not in (None, self.settings.served_name):
            raise ApiError(
                f"There is no such model; this server has '{self.settings.served_name}'.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def deadline(self) -> float:
        """When a request that comes now has to be answered, by the loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.timeout

    async def read_images(self, conversation: Conversation, deadline: float) -> list[Image]:
        """A conversation's images, from wherever they are.

        Raises:
            ApiError: one cannot be read, or not in time.
        """
        return await _in_time(
            deadline, run_in_threadpool(self.images.read_all, conversation.images)
        )

    async def write(
        self,
        conversation: Conversation,
        images: Sequence[Image],
        deadline: float,
        tools: Sequence[dict[str, Any]] = (),
    ) -> Prompt:
        """What the model is given of a conversation.

        Raises:
            ApiError: it cannot be written, or not in time.
        """
        return await _in_time(
            deadline, run_in_threadpool(self.writer.write, conversation, images, tools)
        )

    def begin(
        self,
        prompt: Prompt,
        deadline: float,
        *,
        sampling: Sampling,
        limit: int,
        count: int = 1,
        stops: tuple[str, ...] = (),
    ) -> tuple[Job, Exchange]:
        """Hand a prompt to the generating thread.

        Raises:
            ApiError: it takes nothing now.
        """
        exchange = Exchange(deadline)
        job = Job(prompt, sampling, count, limit, stops, exchange.send)
        self.engine.submit(job)
        return job, exchange


async def _in_time(deadline: float, work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise too_late() from None
