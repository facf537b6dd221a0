"""The routes, and how what goes wrong is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from vlm_safeguard.guard import Guard
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.admission import Admission
from vlm_safeguard.serving.answering import answer
from vlm_safeguard.serving.chat import Completion
from vlm_safeguard.serving.engine import Engine
from vlm_safeguard.serving.errors import ApiError, ErrorAnswer, internal, invalid
from vlm_safeguard.serving.images import ImageReader
from vlm_safeguard.serving.items import ResponseRequest
from vlm_safeguard.serving.metrics import CONTENT_TYPE, Metrics
from vlm_safeguard.serving.moderation import guardrail, moderate
from vlm_safeguard.serving.requests import (
    REFUSED,
    ChatRequest,
    GuardrailRequest,
    ModerationRequest,
)
from vlm_safeguard.serving.responses import ResponseForm
from vlm_safeguard.serving.service import Service
from vlm_safeguard.serving.settings import ServeSettings
from vlm_safeguard.serving.tracing import Tracing


def make_app(
    settings: ServeSettings,
    load: Callable[[], tuple[VLM, Guard]],
    when_over: Callable[[], None] = lambda: None,
    images: ImageReader | None = None,
    tracing: Tracing | None = None,
) -> tuple[Admission, Engine]:
    """The application, and the engine that starts with it.

    Args:
        load: gives the model and its guard.
        when_over: called as the generating thread ends.
        images: reads requests' images.
        tracing: takes spans.
    """
    metrics = Metrics()
    engine = Engine(settings, load, metrics, when_over)
    tracing = tracing or Tracing()
    service = Service(settings, engine, images or ImageReader(settings), metrics, tracing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.drain, settings.drain)

    app = FastAPI(
        title="vlm-safeguard",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    _add_routes(app, service)
    _add_state(app, service)
    app.add_exception_handler(ApiError, _told)
    for status in (400, 404, 405, HTTPException):
        app.add_exception_handler(status, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    endpoints = frozenset(getattr(route, "path", "") for route in app.routes)
    admission = Admission(app, settings, metrics, tracing, endpoints, lambda: engine.wait)
    metrics.watch(lambda: engine.waiting, lambda: admission.asking)
    return admission, engine


def _add_routes(app: FastAPI, service: Service) -> None:
    """What clients ask."""

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, http: Request) -> Response:
        return await answer(service, asked, http, Completion)

    @app.post("/v1/responses", response_model=None)
    async def responses(asked: ResponseRequest, http: Request) -> Response:
        return await answer(service, asked.chat, http, partial(ResponseForm, asked))

    @app.post("/v1/moderations")
    async def moderations(asked: ModerationRequest, http: Request) -> dict[str, Any]:
        return await moderate(service, asked, http)

    @app.post("/beta/litellm_basic_guardrail_api")
    async def litellm(asked: GuardrailRequest, http: Request) -> dict[str, Any]:
        return await guardrail(service, asked, http)

    model = {"id": service.settings.served_name, "object": "model", "created": 0}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{**model, "owned_by": "vlm-safeguard"}]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return {**model, "owned_by": "vlm-safeguard"}


def _add_state(app: FastAPI, service: Service) -> None:
    """What those ask who look after the server."""
    engine = service.engine

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether passes are guarded; also while the model is loaded."""
        starting = not engine.ready and not engine.faults
        well = engine.failure is None and (engine.healthy or starting)
        state = {"status": "ok" if well else "failed", "faults": engine.faults}
        return JSONResponse(state, 200 if well else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether the guard is attached and verified, and requests are taken."""
        well = engine.ready and engine.healthy
        return JSONResponse({"ready": well}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def _told(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _refused(http: Request, error: Exception) -> JSONResponse:
    """What the router refuses, and bodies that are too long or too slow."""
    status, detail = (getattr(error, name) for name in ("status_code", "detail"))  # Starlette's
    codes = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large"}
    message = f"{http.method} {http.url.path}: {detail}" if status in (404, 405) else detail
    return ApiError(message, status=status, code=codes.get(status, "bad_request")).response()


async def _failed(http: Request, error: Exception) -> JSONResponse:
    """What nobody foresaw; `Admission` logs it."""
    return internal().response()


async def _invalid(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)
    return invalid(error.errors(), REFUSED).response()
