"""The door: who may ask, how many at once, how much at a time; each gets an id and a line of log.

It is the outermost layer of the application, so that nothing is read for a client that is not let
in, and nothing that goes wrong within is told.
"""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from asyncio import timeout_at
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic
from typing import Any

from fastapi import HTTPException

from vlm_safeguard.serving.errors import ApiError, internal
from vlm_safeguard.serving.exchange import LeftError
from vlm_safeguard.serving.logs import place_of, request_id
from vlm_safeguard.serving.metrics import Metrics
from vlm_safeguard.serving.settings import ServeSettings
from vlm_safeguard.serving.tracing import Tracing

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready", "/metrics")  # for who looks after the server
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_log = logging.getLogger("vlm_safeguard.serving")


class Admission:
    """The application, behind its door.

    Attributes:
        asking: requests with a body that are not over.
    """

    def __init__(
        self,
        app: App,
        settings: ServeSettings,
        metrics: Metrics,
        tracing: Tracing,
        endpoints: frozenset[str],
        wait: Callable[[], int],
    ) -> None:
        """Of `app`.

        Args:
            endpoints: its paths; others are not named in metrics.
            wait: seconds after which there will be room.
        """
        self._app, self._settings, self._metrics, self._tracing = app, settings, metrics, tracing
        self._endpoints, self._wait = endpoints, wait
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self.asking = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] in OPEN:
            await self._answer(scope, headers, receive, send)
            return
        method, endpoint = scope["method"], self._endpoint(scope["path"])
        with self._tracing.request(f"{method} {endpoint}", headers) as span:
            status, name = await self._answer(scope, headers, receive, send)
            span.note(
                http__request__method=method,
                http__route=endpoint,
                http__response__status_code=status,
                vlm_safeguard__request_id=name,
            )

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> tuple[int, str]:
        """The answer's status, 499 where its client left, and the request's id."""
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        token, started = request_id.set(name), monotonic()
        answer = _Answer(send, name)
        try:
            await self._let_in(scope, headers, receive, answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except LeftError:
            answer.status = 499
        except Exception as error:  # a mistake of ours
            _log.error("failed", extra={"kind": type(error).__name__, "place": place_of(error)})
            if not answer.status:
                await internal().response()(scope, receive, answer)
        finally:
            self._count(scope["path"], answer.status or 499, monotonic() - started)
            request_id.reset(token)
        return answer.status or 499, name

    async def _let_in(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        if scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        self._check_key(headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self.asking >= self._settings.max_batch + self._settings.max_queue:
            raise ApiError(
                "Too many requests wait already. Come back later.",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                retry_after=self._wait(),
            )
        self.asking += 1
        try:
            await self._app(scope, self._bounded(headers, receive), send)
        finally:
            self.asking -= 1

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        """Every key is compared to its end, so that time tells nothing of it."""
        if not self._keys:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(matches):
            raise ApiError(
                "The API key is missing or wrong. Send it as 'Authorization: Bearer …'.",
                status=401,
                code="invalid_api_key",
            )

    def _bounded(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """`receive` of a body that may not be too long, nor take too long."""
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._settings.max_body:
            raise self._too_long()
        size, whole, end = 0, False, monotonic() + self._settings.timeout

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "The request did not come in time.") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._settings.max_body:
                raise HTTPException(413, str(self._too_long()))
            return message

        return bounded

    def _too_long(self) -> ApiError:
        return ApiError(
            f"The request is longer than {self._settings.max_body} bytes.",
            status=413,
            code="request_too_large",
        )

    def _endpoint(self, path: str) -> str:
        return path if path in self._endpoints else "other"

    def _count(self, path: str, status: int, seconds: float) -> None:
        endpoint = self._endpoint(path)
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        if path not in OPEN:
            facts = {"endpoint": endpoint, "status": status, "seconds": round(seconds, 3)}
            _log.info("request", extra=facts)


class _Answer:
    """`send`, which notes the status and adds the request's id."""

    def __init__(self, send: Send, name: str) -> None:
        self._send, self._name = send, name
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self._name.encode()),
            ]
        await self._send(message)
