"""`/v1/chat/completions`: an answer at once, or as a stream of chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from vlm_safeguard.serving.answering import Answering
from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.jobs import Over, Piece


class Completion:
    """Answers as chat completions write them."""

    def __init__(self, answering: Answering) -> None:
        """With an id of its own."""
        self._answering = answering
        self._name = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """See `Form`."""
        choices: dict[int, dict[str, Any]] = {}
        async for event in self._answering.events():
            if isinstance(event, Over):
                reply = self._answering.reply(event)
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
            **self._answering.guard,
        }

    async def events(self) -> AsyncIterator[str]:
        """See `Form`."""
        answering, asked = self._answering, self._answering.asked
        left, usage = answering.job.count, asked.stream_options.include_usage
        try:
            for number in range(left):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            async for event in answering.events():
                if isinstance(event, Piece) and not asked.shown_tools:
                    yield self._chunk(event.choice, {"content": event.text})
                if isinstance(event, Over):
                    left -= 1
                    reply = answering.reply(event)
                    if asked.shown_tools:  # a call is known once it is whole
                        yield self._chunk(event.choice, reply.delta)
                    reason = "tool_calls" if reply.calls else event.reason
                    last = {} if left or usage else answering.guard
                    yield self._chunk(event.choice, {}, reason, **last)
            if usage:
                head = self._head("chat.completion.chunk")
                yield _event({**head, "choices": [], "usage": self._usage(), **answering.guard})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._answering.service.settings.served_name
        return {"id": self._name, "object": kind, "created": self._created, "model": model}

    def _chunk(
        self, choice: int, delta: dict[str, Any], reason: str | None = None, **more: Any
    ) -> str:
        part = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**self._head("chat.completion.chunk"), "choices": [part], **more})

    def _usage(self) -> dict[str, int]:
        prompt, completion = self._answering.prompt_tokens, self._answering.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
