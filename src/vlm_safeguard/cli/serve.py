"""`vlm-safeguard serve`: an OpenAI-compatible server of a guarded model."""

from __future__ import annotations

from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_safeguard.cli.model_options import argument, option, was_given
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.extras import require
from vlm_safeguard.serving.settings import ServeSettings, read_settings, settings_of


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of these options, such as max_batch = 4.")
    ] = None,
    **fields: Any,
) -> None:
    """Serve a model under its guard, as OpenAI's API does; options override what --config says.

    Without --guard one is fitted, and kept for the next time. Nothing is answered unguarded.
    """
    require("serve", "fastapi", "prometheus_client", "uvicorn")
    given = {name: value for name, value in fields.items() if was_given(context, name)}
    values = {} if config is None else read_settings(config)
    where = "the options" if config is None else f"{config} with the options"
    if "model" not in values | given:
        raise SafeguardError("Say what to serve: name a MODEL, or give it in a --config.")
    settings = settings_of(values | given, where)
    from vlm_safeguard.serving.server import serve as run

    run(settings)


def _signature() -> Signature:
    """The command's own parameters, and the settings' in place of `fields`."""
    own = signature(serve, eval_str=True).parameters.values()
    model, *others = ServeSettings.model_fields
    options = (option(ServeSettings, name) for name in others)
    return Signature(
        [
            *(each for each in own if each.name != "fields"),
            argument(ServeSettings, model),
            *options,
        ]
    )


serve.__signature__ = _signature()  # type: ignore[attr-defined]  # which typer reads
