"""The one way from a request to its answer, in whatever form of the API it is asked and given."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vlm_safeguard.evaluation.judges.refusal import is_refusal
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.receipt_object import HEADER, decision, header, opened_by, receipt_object
from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.exchange import Exchange, unless_left
from vlm_safeguard.serving.jobs import Decided, Event, Job, Over, Piece
from vlm_safeguard.serving.requests import ChatRequest
from vlm_safeguard.serving.service import Service
from vlm_safeguard.serving.tools import Reply, read_reply

_log = logging.getLogger("vlm_safeguard.serving")


@dataclass
class Answering:
    """Answers as they come in.

    Attributes:
        asked: the request, as chat completions have it.
        receipt: of what the gate decided.
        texts: of each answer so far.
        tokens: of all answers that are over.
    """

    service: Service
    asked: ChatRequest
    job: Job
    exchange: Exchange
    receipt: Receipt
    texts: list[str] = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.texts = [""] * self.job.count

    async def events(self) -> AsyncIterator[Event]:
        """Until every answer is over.

        Raises:
            ApiError: one of them cannot go on.
        """
        left = self.job.count
        with self.service.tracing.part("answer") as span:
            span.note(
                gen_ai__request__model=self.service.settings.served_name,
                gen_ai__usage__input_tokens=self.prompt_tokens,
                vlm_safeguard__images=len(self.job.prompt.images),
                vlm_safeguard__gate=decision(self.receipt),
                vlm_safeguard__criterion=opened_by(self.receipt),
            )
            while left:
                event = await self.exchange.next()
                if isinstance(event, Piece):
                    self.texts[event.choice] += event.text
                elif isinstance(event, Over):
                    left -= 1
                    self.tokens += len(event.ids)
                    self.service.metrics.refusals.inc(is_refusal(self.texts[event.choice]))
                yield event
            span.note(gen_ai__usage__output_tokens=self.tokens)
        self._note()

    def reply(self, over: Over) -> Reply:
        """What an answer that is over says, and the tools that it calls."""
        text = self.texts[over.choice]
        if not self.asked.shown_tools:
            return Reply(text)
        return read_reply(text, over.ids, self.job.prompt, self.service.writer.tokenizer)

    @property
    def prompt_tokens(self) -> int:
        """Those of images among them."""
        return len(self.job.prompt.ids)

    @property
    def guard(self) -> dict[str, Any]:
        """The receipt as a field of the answer; none where none is wanted."""
        if self.asked.guard.receipt == "none":
            return {}
        return {"guard": receipt_object(self.receipt, self.service.policy)}

    def _note(self) -> None:
        metrics = self.service.metrics
        metrics.tokens.labels("prompt").inc(self.prompt_tokens)
        metrics.tokens.labels("completion").inc(self.tokens)
        facts = {
            "images": len(self.job.prompt.images),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "gate": decision(self.receipt),
            "criterion": opened_by(self.receipt),
        }
        _log.info("answered", extra=facts)


class Form(Protocol):
    """One API's way to write answers."""

    async def whole(self) -> dict[str, Any]:
        """All of it, as one object."""

    def events(self) -> AsyncIterator[str]:
        """The same as the events of a stream, to its end; an error is the last one."""


async def answer(
    service: Service, asked: ChatRequest, http: Request, form: Callable[[Answering], Form]
) -> Response:
    """Answer a request.

    Raises:
        ApiError: it cannot be answered.
        LeftError: nobody waits for the answer.
    """
    _check(service, asked)
    deadline, started = service.deadline(), asyncio.get_running_loop().time()
    with service.tracing.part("read"):
        images = await unless_left(http, service.read_images(asked, deadline))
        prompt = await unless_left(http, service.write(asked, images, deadline, asked.shown_tools))
    job, exchange = service.begin(
        prompt,
        deadline,
        sampling=asked.sampling,
        limit=_limit(service, asked, service.writer.room(prompt)),
        count=asked.n,
        stops=asked.stops,
    )
    try:
        with service.tracing.part("decide"):
            decided = await unless_left(http, exchange.next())
        assert isinstance(decided, Decided), "it comes first"
        service.metrics.decided(decided.receipt)
        service.metrics.first_token_seconds.observe(asyncio.get_running_loop().time() - started)
        headers = {} if asked.guard.receipt == "none" else {HEADER: header(decided.receipt)}
        written = form(Answering(service, asked, job, exchange, decided.receipt))
        if asked.stream:
            return _Stream(written.events(), job, headers)
        return JSONResponse(await unless_left(http, written.whole()), headers=headers)
    except BaseException:
        job.cancelled = True
        raise


def _check(service: Service, asked: ChatRequest) -> None:
    service.check_model(asked.model)
    for name, given, most in (
        ("n", asked.n, service.settings.max_choices),
        ("max_completion_tokens", asked.wanted_tokens or 1, service.settings.max_new_tokens),
    ):
        if given > most:
            message = f"{name} is {given}; this server gives {most} at most."
            raise ApiError(message, param=name, code="invalid_value")


def _limit(service: Service, asked: ChatRequest, room: int | None) -> int:
    """Tokens of an answer at most."""
    wanted = asked.wanted_tokens
    if room is not None and wanted is not None and wanted > room:
        raise ApiError(
            f"The prompt leaves room for {room} tokens of an answer, and {wanted} were asked for.",
            param="max_completion_tokens",
            code="context_length_exceeded",
        )
    limit = service.settings.max_new_tokens if wanted is None else wanted
    return limit if room is None else min(limit, room)


class _Stream(StreamingResponse):
    """A stream whose job ends with it, read to its end or not."""

    def __init__(self, events: AsyncIterator[str], job: Job, headers: dict[str, str]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        )
        self._job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled = True
