"""What several commands share: options, and where people read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vlm_safeguard.loading import Loading

if TYPE_CHECKING:
    from rich.console import Console

_NAMES = "'pocket', 'coder', a Hugging Face Hub id, or a checkpoint folder."
ModelName = Annotated[str, typer.Argument(help=_NAMES)]
ModelOption = Annotated[str, typer.Option(help=_NAMES)]
GuardName = Annotated[
    str | None,
    typer.Option(help="A guard's folder or Hub id (owner/name, owner/name@revision)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Dtype = Annotated[str, typer.Option(help="Weights' type: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where it runs: auto, cpu, cuda, cuda:1, mps, …")]


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `loading` an option for each field of `Loading` in its place."""
    hints = get_type_hints(Loading)
    options = {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[
                hints[field.name],
                typer.Option(f"--{field.name.replace('_', '-')}", help=field.metadata["help"]),
            ],
        )
        for field in fields(Loading)
    }

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        loading = Loading(**{name: given.pop(name) for name in options})
        command(**given, loading=loading)

    signature = inspect.signature(command, eval_str=True)
    parameters = [each for each in signature.parameters.values() if each.name != "loading"]
    shown = [
        *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters),
        *options.values(),
    ]
    with_options.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in shown}
    return with_options


def console(as_json: bool) -> Console:
    """Where people read: standard output, or standard error where that holds JSON."""
    from rich.console import Console

    return Console(stderr=as_json)
