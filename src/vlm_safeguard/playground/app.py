"""The page and what it asks: everything comes from this process, and goes to it alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.conversation import Chat, chat_of
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.playground.adversarial import Against, attack
from vlm_safeguard.playground.comparison import Tell, compare
from vlm_safeguard.playground.events import Event, line
from vlm_safeguard.playground.presets import preset
from vlm_safeguard.playground.worker import Worker
from vlm_safeguard.policy.response import Response as OpenResponse
from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.images import ImageReader
from vlm_safeguard.serving.settings import settings_of

_PAGE = Path(__file__).parent / "page"
_MOST = 16 * 2**20  # bytes of a request
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Asked(BaseModel):
    """One request, and how it is to be answered or attacked."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(max_length=8000)
    image: str | None = None
    response: OpenResponse | None = None
    against: Against = "unguarded"
    preset: str = ""


class _Streamed(StreamingResponse):
    """What a piece of work tells, line by line; the work ends with it, read to its end or not."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        super().__init__((line(event) async for event in events), media_type="application/x-ndjson")
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def make_app(vlm: VLM, guard: Guard, name: str, max_new_tokens: int, hosts: list[str]) -> FastAPI:
    """The application.

    Args:
        name: of the model.
        max_new_tokens: of an answer.
        hosts: names that this machine may be asked by, so that no other site's name leads here.
    """
    worker = Worker()
    images = ImageReader(settings_of({"model": name}, "the model"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(
        title="vlm-safeguard", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_exception_handler(SafeguardError, _wrong)
    app.add_exception_handler(ApiError, _wrong)
    app.add_exception_handler(ValidationError, _wrong)

    @app.middleware("http")
    async def within(http: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(http)
        response.headers.update(_HEADERS)
        return response

    def chat_from(asked: Asked, otherwise: bool = False) -> Chat:
        if not asked.question.strip():
            raise SafeguardError("Type a question.")
        shown = images.read_all([] if asked.image is None else [asked.image])
        return chat_of(asked.question, *(shown or [noise_image(0)] * otherwise))

    def streamed(work: Callable[[Tell], None]) -> StreamingResponse:
        return _Streamed(worker.events(work))

    @app.get("/about")
    async def about() -> dict[str, Any]:
        policy = guard.policy
        return {"model": name, "response": policy.response, "policy": policy.sha256()}

    @app.post("/preset")
    def shown(asked: Annotated[Asked, Depends(_asked)]) -> dict[str, Any]:
        return asdict(preset(asked.preset, asked.question))

    @app.post("/compare")
    async def compared(asked: Annotated[Asked, Depends(_asked)]) -> StreamingResponse:
        own = asked.response or guard.policy.response
        chosen = guard.variant(response=own)
        return streamed(partial(compare, vlm, chosen, chat_from(asked), max_new_tokens))

    @app.post("/attack")
    async def attacked(asked: Annotated[Asked, Depends(_asked)]) -> StreamingResponse:
        chat = chat_from(asked, otherwise=True)
        return streamed(partial(attack, vlm, guard, chat, asked.against))

    app.mount("/", StaticFiles(directory=_PAGE, html=True))
    return app


async def _asked(http: Request) -> Asked:
    """A request's body: JSON that says so, which no page of another site can send unasked."""
    if http.headers.get("content-type") != "application/json":
        raise HTTPException(415, "Send JSON.")
    body = b""
    async for piece in http.stream():
        body += piece
        if len(body) > _MOST:
            raise HTTPException(413, f"A request may have {_MOST // 2**20} MiB.")
    return Asked.model_validate_json(body)


async def _wrong(http: Request, error: Exception) -> JSONResponse:
    """What was asked cannot be done, in a sentence."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return JSONResponse({"reason": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 400)
    return JSONResponse({"reason": str(error)}, 400)
