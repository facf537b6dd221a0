"""A server of a tiny model, and what clients send it."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL.Image import Image

from vlm_safeguard.evaluation.asks.images import data_url
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.pocket.architecture import CHAT_TEMPLATE
from vlm_safeguard.serving.app import make_app
from vlm_safeguard.serving.engine import Engine
from vlm_safeguard.serving.images import ImageReader
from vlm_safeguard.serving.settings import ServeSettings

NAME = "tiny"
#: Writes tools, and calls of a function with a place.
TOOL_TEMPLATE = (
    "{%- if tools -%}{{ '<|im_start|>system\nTools:' }}"
    "{%- for tool in tools -%}{{ ' ' + tool.function.name }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}"
) + CHAT_TEMPLATE.replace(
    "{{ '<|im_end|>\n' }}",
    "{%- for call in message.tool_calls or [] -%}"
    "{{ call.function.name + '(' + call.function.arguments.place + ')' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}",
    1,
)


def said(text: str, *images: Image) -> Any:
    """A conversation of one message, as JSON: images, then text."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def body(text: str, *images: Image, **more: Any) -> dict[str, Any]:
    """A greedy request of few tokens."""
    return {
        "model": NAME,
        "messages": said(text, *images),
        "temperature": 0,
        "max_tokens": 4,
        **more,
    }


def until(true: Callable[[], bool], seconds: float = 60, pause: float = 0.01) -> None:
    """Wait for something to be so, looking again after each pause."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(pause)


def keep_logs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a server changes of this process's logs and standard error is undone."""
    log = logging.getLogger("vlm_safeguard.serving")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(sys, "stderr", sys.stderr)


def settings(**more: Any) -> ServeSettings:
    """Those of the tiny model's server."""
    return ServeSettings(model="folder", name=NAME, **more)


@contextmanager
def served(
    vlm: VLM, guard: Guard, images: ImageReader | None = None, **more: Any
) -> Iterator[tuple[TestClient, Engine]]:
    """The application without a network, once it is ready."""
    app, engine = make_app(settings(**more), lambda: (vlm, guard), images=images)
    with TestClient(app) as client:
        until(lambda: engine.ready or engine.failure is not None)
        assert engine.failure is None
        yield client, engine


@contextmanager
def listening(vlm: VLM, guard: Guard, **more: Any) -> Iterator[tuple[str, Engine]]:
    """The application behind uvicorn: its address, once it is ready."""
    app, engine = make_app(settings(**more), lambda: (vlm, guard))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as port:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
        thread.start()
        until(lambda: engine.ready or engine.failure is not None)
        assert engine.failure is None
        try:
            yield f"http://127.0.0.1:{port.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(60)


def openai_client(address: str, key: str = "none") -> openai.OpenAI:
    """The official one, without retries and proxies."""
    return openai.OpenAI(
        base_url=f"{address}/v1",
        api_key=key,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False, timeout=60),
    )
