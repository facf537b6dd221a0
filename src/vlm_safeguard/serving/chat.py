"""`/v1/chat/completions`: an answer at once, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vlm_safeguard.evaluation.judges.refusal import is_refusal
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.exchange import Exchange, unless_left
from vlm_safeguard.serving.jobs import Decided, Event, Job, Over, Piece
from vlm_safeguard.serving.receipts import HEADER, decision, header, opened_by, receipt_object
from vlm_safeguard.serving.requests import ChatRequest
from vlm_safeguard.serving.service import Service
from vlm_safeguard.serving.tools import Reply, read_reply

_log = logging.getLogger("vlm_safeguard.serving")


async def complete(service: Service, asked: ChatRequest, http: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it cannot be answered.
        LeftError: nobody waits for the answer.
    """
    _check(service, asked)
    deadline, started = service.deadline(), asyncio.get_running_loop().time()
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
        decided = await unless_left(http, exchange.next())
        assert isinstance(decided, Decided), "it comes first"
        service.metrics.decided(decided.receipt)
        service.metrics.first_token_seconds.observe(asyncio.get_running_loop().time() - started)
        answering = _Answering(service, asked, job, exchange, decided.receipt)
        headers = {} if asked.guard.receipt == "none" else {HEADER: header(decided.receipt)}
        if asked.stream:
            return _Stream(answering, headers)
        return JSONResponse(await unless_left(http, answering.whole()), headers=headers)
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


@dataclass
class _Answering:
    """Answers as they come in."""

    service: Service
    asked: ChatRequest
    job: Job
    exchange: Exchange
    receipt: Receipt
    name: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    texts: list[str] = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.texts = [""] * self.job.count

    async def whole(self) -> dict[str, Any]:
        """All of it, as one object."""
        choices: dict[int, dict[str, Any]] = {}
        async for event in self._events():
            if isinstance(event, Over):
                reply = self._reply(event)
                choices[event.choice] = {
                    "index": event.choice,
                    "message": {"role": "assistant", **reply.message},
                    "logprobs": None,
                    "finish_reason": "tool_calls" if reply.calls else event.reason,
                }
        return {
            **self._head("chat.completion"),
            "choices": [choices[number] for number in sorted(choices)],
            "usage": self._usage(),
            **self._guard(),
        }

    async def chunks(self) -> AsyncIterator[str]:
        """Events of a stream."""
        try:
            for number in range(self.job.count):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            left, usage = self.job.count, self.asked.stream_options.include_usage
            async for event in self._events():
                if isinstance(event, Piece) and not self.asked.shown_tools:
                    yield self._chunk(event.choice, {"content": event.text})
                if isinstance(event, Over):
                    left -= 1
                    reply = self._reply(event)
                    if self.asked.shown_tools:  # a call is known once it is whole
                        yield self._chunk(event.choice, reply.delta)
                    reason = "tool_calls" if reply.calls else event.reason
                    last = {} if left or usage else self._guard()
                    yield self._chunk(event.choice, {}, reason, **last)
            if usage:
                head = self._head("chat.completion.chunk")
                yield _event({**head, "choices": [], "usage": self._usage(), **self._guard()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    async def _events(self) -> AsyncIterator[Event]:
        """Until every answer is over."""
        left = self.job.count
        while left:
            event = await self.exchange.next()
            if isinstance(event, Piece):
                self.texts[event.choice] += event.text
            elif isinstance(event, Over):
                left -= 1
                self.tokens += len(event.ids)
                self.service.metrics.refusals.inc(is_refusal(self.texts[event.choice]))
            yield event
        self._note()

    def _reply(self, over: Over) -> Reply:
        text = self.texts[over.choice]
        if not self.asked.shown_tools:
            return Reply(text)
        return read_reply(text, over.ids, self.job.prompt, self.service.writer.tokenizer)

    def _note(self) -> None:
        metrics, prompt = self.service.metrics, self.job.prompt
        metrics.tokens.labels("prompt").inc(len(prompt.ids))
        metrics.tokens.labels("completion").inc(self.tokens)
        facts = {
            "images": len(prompt.images),
            "prompt_tokens": len(prompt.ids),
            "completion_tokens": self.tokens,
            "gate": decision(self.receipt),
            "criterion": opened_by(self.receipt),
        }
        _log.info("answered", extra=facts)

    # --- as JSON ---

    def _head(self, kind: str) -> dict[str, Any]:
        model = self.service.settings.served_name
        return {"id": self.name, "object": kind, "created": self.created, "model": model}

    def _chunk(
        self, choice: int, delta: dict[str, Any], reason: str | None = None, **more: Any
    ) -> str:
        part = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**self._head("chat.completion.chunk"), "choices": [part], **more})

    def _usage(self) -> dict[str, int]:
        prompt = len(self.job.prompt.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
        }

    def _guard(self) -> dict[str, Any]:
        if self.asked.guard.receipt == "none":
            return {}
        return {"guard": receipt_object(self.receipt, self.service.policy)}


class _Stream(StreamingResponse):
    """A stream whose job ends with it, read to its end or not."""

    def __init__(self, answering: _Answering, headers: dict[str, str]) -> None:
        super().__init__(
            answering.chunks(),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        )
        self._job = answering.job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled = True


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
