"""`vlm-safeguard serve`: an OpenAI-compatible server of a guarded model."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_safeguard.cli.model_options import argument, flag, option, was_given
from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.extras import require
from vlm_safeguard.serving.settings import ServeSettings, read_settings, settings_of


class Engine(StrEnum):
    """What runs the model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of these options, such as max_batch = 4.")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="What runs the model; options of vLLM's own follow behind --.")
    ] = Engine.TRANSFORMERS,
    guard_order: Annotated[
        Order,
        typer.Option(
            help="vLLM: a request with an image goes in behind its verdict (first), beside its "
            "text (together), or so where the engine is idle (auto)."
        ),
    ] = Order.AUTO,
    refusal_alone: Annotated[
        bool,
        typer.Option(help="vLLM: let the model's own refusal decide where the gate reads states."),
    ] = False,
    **fields: Any,
) -> None:
    """Serve a model under its guard, as OpenAI's API does; options override what --config says.

    Without --guard one is fitted, and kept for the next time. Nothing is answered unguarded.
    """
    if engine is Engine.VLLM:
        given = {name: value for name, value in fields.items() if was_given(context, name)}
        _serve_vllm(given, context.args, guard_order, refusal_alone)
        return
    if context.args:
        raise SafeguardError(
            f"'{context.args[0]}' is one argument too many; options behind -- are vLLM's "
            "(--engine vllm)."
        )
    require("serve", "fastapi", "prometheus_client", "uvicorn")
    given = {name: value for name, value in fields.items() if was_given(context, name)}
    values = {} if config is None else read_settings(config)
    where = "the options" if config is None else f"{config} with the options"
    if "model" not in values | given:
        raise SafeguardError("Say what to serve: name a MODEL, or give it in a --config.")
    settings = settings_of(values | given, where)
    from vlm_safeguard.serving.server import serve as run

    run(settings)


def _serve_vllm(
    given: dict[str, Any], options: list[str], order: Order, refusal_alone: bool
) -> None:
    """Serve inside vLLM.

    Raises:
        SafeguardError: an option is missing, or is not for vLLM.
    """
    other = sorted(given.keys() - {"model", "guard", "response"})
    if other:
        raise SafeguardError(
            f"{flag(ServeSettings, other[0])} is not for vLLM; give its own options behind --, "
            "such as -- --port 8000."
        )
    if "model" not in given or "guard" not in given:
        raise SafeguardError(
            "vLLM needs a MODEL and a --guard, which is fitted before: vlm-safeguard fit MODEL "
            "FOLDER."
        )
    if find_spec("vllm") is None:
        raise SafeguardError(
            "vLLM is not in this environment; docs/vllm.md says how to make one that has it."
        )
    from vlm_safeguard.engines.vllm.server import serve as run
    from vlm_safeguard.loading import read_guard
    from vlm_safeguard.policy.response import Response

    guard = read_guard(given["guard"])
    if given.get("response") is not None:
        guard = guard.variant(response=Response.named(given["response"]))
    run(given["model"], guard, options, order=order, refusal_alone=refusal_alone)


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
