"""vLLM's server, guarded or not, as a process of its own; and requests to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.images import data_url
from vlm_safeguard.model.conversation import Chat
from vlm_safeguard.policy.receipt_object import HEADER

_STARTS, _ANSWERS = 300.0, 1200.0  # seconds at most
#: How vLLM runs here: eagerly, in float32, on the CPU, away from the network.
OPTIONS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "2048")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
T = TypeVar("T")


@dataclass
class Reply:
    """What came back.

    Attributes:
        first: seconds to the first token.
        read: tokens of the prompt that was answered; `wrote`, of the answer.
        error: of the server, if it was one; in the middle of a stream, too.
    """

    status: int
    text: str = ""
    header: str = ""
    guard: dict[str, Any] = field(default_factory=dict)
    first: float = 0.0
    read: int = 0
    wrote: int = 0
    error: str = ""


class Client:
    """Asks one server.

    Attributes:
        http: the connections of what `run` runs.
    """

    http: httpx.AsyncClient

    def __init__(self, port: int, model: str) -> None:
        """Of the server on `port` of this machine."""
        self._url, self._model = f"http://127.0.0.1:{port}", model

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of something that asks, with connections of its own."""

        async def connected() -> T:
            async with httpx.AsyncClient(
                base_url=self._url, timeout=_ANSWERS, limits=httpx.Limits(max_connections=None)
            ) as self.http:
                return await work

        return asyncio.run(connected())

    async def ask(self, chat: Chat, tokens: int, **more: Any) -> Reply:
        """One conversation, answered greedily, as a stream."""
        body = {
            "model": self._model,
            "messages": messages_of(chat),
            "temperature": 0,
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        start = time.perf_counter()
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            reply = Reply(answer.status_code, header=answer.headers.get(HEADER, ""))
            if reply.status != 200:
                reply.error = (await answer.aread()).decode()
                return reply
            async for event in _events(answer):
                if "error" in event:
                    reply.status, reply.error = 500, str(event["error"])
                    return reply
                reply.guard = event.get("guard", reply.guard)
                if usage := event.get("usage"):
                    reply.read, reply.wrote = usage["prompt_tokens"], usage["completion_tokens"]
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    if piece and not reply.text:
                        reply.first = time.perf_counter() - start
                    reply.text += piece
        return reply

    async def all(self, chats: Sequence[Chat], tokens: int, at_once: int) -> list[Reply]:
        """All conversations, so many at a time, in order."""
        places = asyncio.Semaphore(at_once)

        async def one(chat: Chat) -> Reply:
            async with places:
                return await self.ask(chat, tokens)

        return list(await asyncio.gather(*map(one, chats)))


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def messages_of(chat: Chat) -> list[dict[str, Any]]:
    """A conversation as OpenAI's API takes it."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image_url", "image_url": {"url": data_url(part)}}
                for part in turn.content
            ],
        }
        for turn in chat
    ]


@contextmanager
def serving(
    model: Path,
    log: Path,
    *options: str,
    guard: Path | None = None,
    order: Order = Order.AUTO,
    refusal_alone: bool = False,
) -> Iterator[Client]:
    """A server of this checkpoint, guarded if a guard is named, until the block is left."""
    port = _free_port()
    own = [*OPTIONS, "--port", str(port), "--served-model-name", "vlm", *options]
    if guard is None:
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *own]
    else:
        under = ["--guard", str(guard), "--guard-order", str(order)]
        under += ["--refusal-alone"] * refusal_alone
        command = ["-m", "vlm_safeguard.cli", "serve", str(model), "--engine", "vllm", *under]
        command += ["--", *own]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        try:
            _wait(process, port, log)
            yield Client(port, "vlm")
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _STARTS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SafeguardError(f"vLLM ended at once: {log.read_text()[-2000:]}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise SafeguardError(f"vLLM did not start in {_STARTS:.0f} s: {log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it, and what it started."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
