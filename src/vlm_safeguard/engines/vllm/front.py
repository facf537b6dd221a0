"""The outermost layer of vLLM's server: refused routes stay shut, and no answer lacks its receipt.

It is the last of the closed doors: an answer that did not come through the guarded client has no
receipt, and is withheld.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vlm_safeguard.engines.vllm import routes
from vlm_safeguard.engines.vllm.ledger import Ledger, ledger
from vlm_safeguard.policy.receipt_object import HEADER, header

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_EVENT = b"data: "


class Front:
    """An ASGI middleware, as vLLM's `--middleware` takes them."""

    def __init__(self, app: App) -> None:
        """Around vLLM's application."""
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        why = routes.reason(path)
        if scope["type"] != "http" or why is not None:
            await _refuse(scope, send, f"'{path}' is refused under the guard: {why}.")
        elif path in routes.GUARDED:
            await self._guarded(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _guarded(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        noted = Ledger()
        token = ledger.set(noted)
        try:
            await self._app(scope, receive, _Withheld(send, noted))
        finally:
            ledger.reset(token)


class _Withheld:
    """`send`, which lets nothing through until the request has a receipt."""

    def __init__(self, send: Send, noted: Ledger) -> None:
        self._send, self._ledger = send, noted
        self._start: Message = {}
        self._body = b""
        self._open = False

    async def __call__(self, message: Message) -> None:
        """As ASGI calls it."""
        if message["type"] == "http.response.start":
            self._start = message
        elif self._open or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            more = message.get("more_body", False)
            if self._ledger.receipts or self._start["status"] >= 400 or not more:
                self._open = True
                await self._release(more)

    async def _release(self, more: bool) -> None:
        """What was withheld: with its receipt, or as an error where it has none."""
        start, body = self._start, self._body
        if start["status"] < 400 and not self._ledger.receipts:
            await _answer(self._send, *_failure(body))
            return
        objects = self._ledger.objects
        headers = [pair for pair in start.get("headers", []) if pair[0] != b"content-length"]
        if len(objects) == 1:
            headers.append((HEADER.encode(), header(self._ledger.receipts[0]).encode()))
        if start["status"] < 400 and (len(objects) == 1 or not more):
            body = with_guard(body, objects)
        if not more:
            headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def with_guard(body: bytes, objects: list[dict[str, Any]]) -> bytes:
    """A JSON body, or the first event of a stream, with `guard` in it.

    That is an object, or a list of them where one HTTP request asked for several answers.
    """
    start = body.find(_EVENT) + len(_EVENT) if body[:1] != b"{" and _EVENT in body else 0
    end = body.find(b"\n", start) if start else len(body)
    try:
        answer = json.loads(body[start:end])
    except ValueError:
        return body  # of a binary form: its header holds the receipt
    if not isinstance(answer, dict):
        return body
    answer["guard"] = objects[0] if len(objects) == 1 else objects
    return body[:start] + json.dumps(answer).encode() + body[end:]


def _failure(body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and body instead of an answer without a receipt: vLLM's own error, if it is one."""
    try:
        told = json.loads(body.partition(_EVENT)[2].partition(b"\n")[0])
        error = told["error"]
        code = int(error["code"])
        return (code if 400 <= code < 600 else 500), {"error": error}
    except (ValueError, KeyError, TypeError):
        return 500, _told("An answer came without the guard's receipt, so it was withheld.", 500)


def _told(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def _refuse(scope: MutableMapping[str, Any], send: Send, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
    else:
        await _answer(send, 403, _told(message, 403))


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    encoded = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(encoded)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": encoded, "more_body": False})
