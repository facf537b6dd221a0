"""A server from its start to its end: the process ends with an error where the guard fails."""

from __future__ import annotations

import os
import signal
import sys

import uvicorn
from pydantic import SecretStr

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.loading import kept_guard, load_model, read_guard
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.response import Response
from vlm_safeguard.serving.app import make_app
from vlm_safeguard.serving.listening import listen
from vlm_safeguard.serving.logs import log_to_stderr
from vlm_safeguard.serving.settings import KEY_VARIABLE, ServeSettings
from vlm_safeguard.serving.tracing import tracing_to


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT, which let answers that are begun end.

    Raises:
        SafeguardError: the address cannot be listened on, or the guard could not be fitted,
            attached or verified.
    """
    settings = _with_key_of_environment(settings)
    log_to_stderr()
    listening = listen(settings.host, settings.port)

    def stop() -> None:
        server.should_exit = True

    tracing = tracing_to(settings.otlp_endpoint)
    app, engine = make_app(settings, lambda: guarded_model(settings), stop, tracing=tracing)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain) + 1,
    )
    server = uvicorn.Server(config)
    host, port = listening.getsockname()[:2]
    print(f"Listening on http://{host}:{port} as '{settings.served_name}'.", file=sys.stderr)
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop())  # uvicorn raises it again
    try:
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        tracing.close()
    if engine.failure is not None:
        raise SafeguardError(engine.failure)


def guarded_model(settings: ServeSettings) -> tuple[VLM, Guard]:
    """The model and its guard, which is fitted and kept if none is named.

    Raises:
        SafeguardError: one of them cannot be loaded, or the guard cannot be fitted.
    """
    model, processor = load_model(settings.model, settings.loading)
    if settings.guard is None:
        guard = kept_guard(settings.model, model, processor)
    else:
        guard = read_guard(settings.guard)
    if settings.response is not None:
        guard = guard.variant(response=Response.named(settings.response))
    return VLM(model, processor), guard


def _with_key_of_environment(settings: ServeSettings) -> ServeSettings:
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return settings
    return settings.model_copy(update={"api_keys": (*settings.api_keys, SecretStr(key))})
