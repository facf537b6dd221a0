"""The socket that a server listens on, taken before anything that is slow."""

from __future__ import annotations

import socket

from vlm_safeguard.errors import SafeguardError


def listen(host: str, port: int) -> socket.socket:
    """Take an address; port 0 is a free one.

    Raises:
        SafeguardError: it cannot be had.
    """
    try:
        listening = socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=2048,
        )
    except OSError as error:
        raise SafeguardError(
            f"The server cannot listen on {host}:{port} ({error.strerror}); "
            "name another --host or --port."
        ) from error
    # connections inherit it: asyncio sets it on its own sockets only, and without it an answer's
    # first words wait for the client to acknowledge its headers, which takes 40 ms
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
