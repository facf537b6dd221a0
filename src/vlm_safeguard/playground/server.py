"""A playground from its start to its end."""

from __future__ import annotations

import sys
from ipaddress import ip_address

import uvicorn

from vlm_safeguard.loading import Loading, kept_guard, load_model, read_guard
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.playground.app import make_app
from vlm_safeguard.serving.listening import listen

_LEAVING = 2  # seconds that answers get to end in


def run(
    name: str, loading: Loading, guard: str | None, host: str, port: int, max_new_tokens: int
) -> None:
    """Load a model and its guard, and show the page until it is stopped.

    Args:
        name: of the model.
        guard: its folder or Hub id; None to fit one, and keep it.

    Raises:
        SafeguardError: the address cannot be had, or one of them cannot be loaded.
    """
    listening = listen(host, port)
    print(f"Loading '{name}' …", file=sys.stderr)
    model, processor = load_model(name, loading)
    fitted = kept_guard(name, model, processor) if guard is None else read_guard(guard)
    with fitted.attach(model):
        pass  # what cannot be guarded is said now, not at the first question
    at, taken = listening.getsockname()[:2]
    private = is_private(host)
    if not private:
        print(
            "Everybody who reaches this address can ask the unguarded model, too; the playground "
            "is made for one person at one machine.",
            file=sys.stderr,
        )
    print(f"Open http://{f'[{at}]' if ':' in at else at}:{taken} in a browser.", file=sys.stderr)
    hosts = [host, "localhost", "127.0.0.1", "::1", "[::1]"] if private else ["*"]
    app = make_app(VLM(model, processor), fitted, name, max_new_tokens, hosts)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_LEAVING
    )
    uvicorn.Server(config).run(sockets=[listening])


def is_private(host: str) -> bool:
    """Whether this machine alone reaches an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
