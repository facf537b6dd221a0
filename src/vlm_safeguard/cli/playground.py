"""`vlm-safeguard playground`: a page with both answers to a request, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm_safeguard.cli.loading import GuardName, ModelName, loads_a_model
from vlm_safeguard.extras import require
from vlm_safeguard.loading import Loading


@loads_a_model
def playground(
    model: ModelName = "pocket",
    guard: GuardName = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 64,
    *,
    loading: Loading,
) -> None:
    """Show a page in the browser: one request, answered unguarded and guarded, and why.

    Without --guard one is fitted, and kept for the next time.
    """
    require("playground", "fastapi", "uvicorn")
    from vlm_safeguard.playground.server import run

    run(model, loading, guard, host, port, max_new_tokens)
