"""`/v1/responses`: the same answers as chat completions give, as items, and typed events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

from vlm_safeguard.serving.answering import Answering
from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.items import ResponseRequest
from vlm_safeguard.serving.jobs import Over, Piece


class ResponseForm:
    """An answer as the Responses API writes it."""

    def __init__(self, asked: ResponseRequest, answering: Answering) -> None:
        """Of a request, which the answer repeats in part."""
        self._asked, self._answering = asked, answering
        self._name, self._message = _name("resp"), _name("msg")
        self._created = int(time.time())
        self._numbers = count()

    async def whole(self) -> dict[str, Any]:
        """See `Form`."""
        async for event in self._answering.events():
            if isinstance(event, Over):
                over = event
        return self._response(over, self._items(over))

    async def events(self) -> AsyncIterator[str]:
        """See `Form`."""
        streamed, begun = not self._answering.asked.shown_tools, False
        try:
            for kind in ("created", "in_progress"):
                yield self._event(f"response.{kind}", response=self._response(None, []))
            async for event in self._answering.events():
                if isinstance(event, Piece) and streamed:
                    for line in () if begun else self._message_begins():
                        yield line
                    begun = True
                    yield self._of_text("delta", delta=event.text)
                if isinstance(event, Over):
                    items = self._items(event)
                    for number, item in enumerate(items):
                        for line in self._item_ends(number, item, begun=begun):
                            yield line
                    response = self._response(event, items)
                    yield self._event(f"response.{response['status']}", response=response)
        except ApiError as error:  # as the API's pages have it, and as its clients read it
            told = error.body["error"]
            yield self._event("error", **{**told, "error": told, "type": "error"})

    # --- events ---

    def _event(self, kind: str, **facts: Any) -> str:
        data = {"type": kind, "sequence_number": next(self._numbers), **facts}
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    def _of_text(self, kind: str, **facts: Any) -> str:
        return self._of_part(f"output_text.{kind}", logprobs=[], **facts)

    def _of_part(self, kind: str, **facts: Any) -> str:
        place = {"item_id": self._message, "output_index": 0, "content_index": 0}
        return self._event(f"response.{kind}", **place, **facts)

    def _message_begins(self) -> Iterator[str]:
        item = {**self._message_item("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._of_part("content_part.added", part=_text_part(""))

    def _item_ends(self, number: int, item: dict[str, Any], *, begun: bool) -> Iterator[str]:
        """What is left to send of an item, all of it where it is not begun."""
        if item["type"] == "message":
            (part,) = item["content"]
            if not begun:
                yield from self._message_begins()
                if part["text"]:
                    yield self._of_text("delta", delta=part["text"])
            yield self._of_text("done", text=part["text"])
            yield self._of_part("content_part.done", part=part)
        else:
            opened = {**item, "arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=number, item=opened)
            place = {"item_id": item["id"], "output_index": number}
            kind, written = "response.function_call_arguments", item["arguments"]
            yield self._event(f"{kind}.delta", **place, delta=written)
            yield self._event(f"{kind}.done", **place, name=item["name"], arguments=written)
        yield self._event("response.output_item.done", output_index=number, item=item)

    # --- as JSON ---

    def _items(self, over: Over) -> list[dict[str, Any]]:
        reply = self._answering.reply(over)
        status = "completed" if over.reason == "stop" else "incomplete"
        said = [self._message_item(reply.text, status)] if reply.text or not reply.calls else []
        calls = [
            {
                "type": "function_call",
                "id": _name("fc"),
                "call_id": call["id"],
                **call["function"],
                "status": "completed",
            }
            for call in reply.calls
        ]
        return [*said, *calls]

    def _message_item(self, text: str, status: str) -> dict[str, Any]:
        item = {"type": "message", "id": self._message, "role": "assistant", "status": status}
        return {**item, "content": [_text_part(text)]}

    def _response(self, over: Over | None, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The response with what is known of it: `over` once its answer is."""
        asked = self._asked
        cut = over is not None and over.reason == "length"
        status = "in_progress" if over is None else "incomplete" if cut else "completed"
        return {
            "id": self._name,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self._answering.service.settings.served_name,
            "output": items,
            "usage": None if over is None else self._usage(),
            **asked.model_dump(
                mode="json",
                include={
                    *("instructions", "tools", "tool_choice", "parallel_tool_calls"),
                    *("temperature", "top_p", "max_output_tokens", "text", "truncation"),
                    *("store", "background", "user", "safety_identifier", "metadata"),
                },
            ),
            "previous_response_id": None,
            **({} if over is None else self._answering.guard),
        }

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._answering.prompt_tokens, self._answering.tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        }


def _name(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
