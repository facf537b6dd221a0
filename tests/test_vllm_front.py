"""vLLM's server behind the guard's front: refused routes, receipts, and answers without one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vlm_safeguard.engines.vllm import routes
from vlm_safeguard.engines.vllm.front import Front, with_guard
from vlm_safeguard.engines.vllm.ledger import note
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.receipt_object import HEADER
from vlm_safeguard.policy.request import read_request

Send = Callable[[dict[str, Any]], Awaitable[None]]


def app(
    guard: Guard, bodies: list[bytes], *, receipts: int, before: int = 0, status: int = 200
) -> Any:
    """An application that notes receipts before its `before`-th body."""

    async def answer(scope: Any, receive: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        for number, body in enumerate(bodies):
            if number == before:
                for _ in range(receipts):
                    note(guard.policy).receipt = _receipt(guard)
            more = number < len(bodies) - 1
            await send({"type": "http.response.body", "body": body, "more_body": more})

    return answer


def _receipt(guard: Guard) -> Receipt:
    request = read_request(guard.policy, [20, 21])
    return Receipt.of(request, (), response=None, layers=(), edit="x", harm=None, policy="ab" * 32)


def ask(application: Any, path: str = "/v1/chat/completions", kind: str = "http") -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(Front(application)({"type": kind, "path": path}, receive, send))
    return sent


def body_of(sent: list[Any]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent[1:])


def test_an_answer_gets_its_receipt(guard: Guard) -> None:
    start, *rest = ask(app(guard, [b'{"choices": []}'], receipts=1))
    headers = dict(start["headers"])
    assert headers[HEADER.encode()] == b"not_asked; policy=abababababab"
    assert int(headers[b"content-length"]) == len(rest[0]["body"])
    answer = json.loads(rest[0]["body"])
    assert answer["choices"] == []
    assert answer["guard"]["open"] is False


def test_several_answers_get_theirs(guard: Guard) -> None:
    sent = ask(app(guard, [b"{}"], receipts=2))
    assert HEADER.encode() not in dict(sent[0]["headers"])
    assert len(json.loads(body_of(sent))["guard"]) == 2


def test_the_first_event_of_a_stream_holds_it(guard: Guard) -> None:
    events = [b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]
    sent = ask(app(guard, events, receipts=1))
    first, *others = body_of(sent).split(b"\n\n")
    assert json.loads(first.removeprefix(b"data: "))["guard"]["policy"] == "ab" * 32
    assert others == [b'data: {"n": 2}', b"data: [DONE]", b""]


def test_nothing_leaves_before_the_verdict(guard: Guard) -> None:
    events = [b": alive\n\n", b'event: a\ndata: {"n": 1}\n\n', b'data: {"n": 2}\n\n']
    sent = ask(app(guard, events, receipts=1, before=1))
    assert len(sent) == 3  # the start, what was withheld, and the last event
    assert b"alive" in sent[1]["body"]
    assert b'"guard"' in sent[1]["body"]


@pytest.mark.parametrize("bodies", [[b'{"choices": []}'], [b'data: {"n": 1}\n\n', b"data: x\n\n"]])
def test_an_answer_without_a_receipt_is_withheld(guard: Guard, bodies: list[bytes]) -> None:
    start, *rest = ask(app(guard, bodies, receipts=0))
    assert start["status"] == 500
    assert "withheld" in json.loads(rest[0]["body"])["error"]["message"]
    assert len(rest) == 1


def test_an_error_of_vllms_goes_through(guard: Guard) -> None:
    sent = ask(app(guard, [b'{"error": {"code": 400}}'], receipts=0, status=400))
    assert sent[0]["status"] == 400
    assert body_of(sent) == b'{"error": {"code": 400}}'
    told = b'data: {"error": {"message": "too long", "code": 400}}\n\ndata: [DONE]\n\n'
    sent = ask(app(guard, [told], receipts=0))
    assert sent[0]["status"] == 400
    assert json.loads(body_of(sent))["error"]["message"] == "too long"


@pytest.mark.parametrize("path", [*routes.REFUSED, "/new/route", "/v1/embeddings", "/metrics/x"])
def test_refused_routes_are_shut(guard: Guard, path: str) -> None:
    sent = ask(app(guard, [b"{}"], receipts=1), path)
    assert sent[0]["status"] == 403
    assert path in json.loads(body_of(sent))["error"]["message"]


def test_a_websocket_is_refused(guard: Guard) -> None:
    (message,) = ask(app(guard, [b"{}"], receipts=1), "/v1/realtime", "websocket")
    assert message["type"] == "websocket.close"


def test_what_generates_nothing_needs_no_receipt(guard: Guard) -> None:
    sent = ask(app(guard, [b"{}"], receipts=0), "/health")
    assert sent[0]["status"] == 200
    assert body_of(sent) == b"{}"


def test_a_body_that_is_not_json_is_left_alone() -> None:
    assert with_guard(b"\x81\xa1", [{}]) == b"\x81\xa1"
    assert with_guard(b"[1]", [{}]) == b"[1]"


def test_no_route_is_in_two_classes() -> None:
    classes = [routes.GUARDED, routes.PASSED, routes.REFUSED.keys()]
    assert sum(map(len, classes)) == len(set().union(*classes))
