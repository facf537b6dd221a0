"""A command's options from a pydantic model: a field each, with its help and default."""

from __future__ import annotations

from inspect import Parameter
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def argument(model: type[BaseModel], name: str) -> Parameter:
    """A field as the command's argument."""
    field = model.model_fields[name]
    return _parameter(name, field, typer.Argument(help=field.description))


def option(model: type[BaseModel], name: str) -> Parameter:
    """A field as an option; one that holds several values takes one, and can be repeated."""
    field = model.model_fields[name]
    several = get_origin(field.annotation) is tuple
    help_text = f"{field.description} Can be repeated." if several else field.description
    return _parameter(name, field, typer.Option(flag(model, name), help=help_text))


def flag(model: type[BaseModel], name: str) -> str:
    """A field's option as it is typed: `allow_hosts`, which holds several, is `--allow-host`."""
    several = get_origin(model.model_fields[name].annotation) is tuple
    return f"--{(name.removesuffix('s') if several else name).replace('_', '-')}"


def was_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line: defaults do not override a file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parameter(name: str, field: FieldInfo, info: Any) -> Parameter:
    """One parameter; the model itself checks what is more than numbers, text, yes or no."""
    default = None if field.is_required() else field.get_default()
    kinds = (field.annotation, *get_args(field.annotation))
    kind: Any = next((each for each in (bool, int, float) if each in kinds), str)
    if get_origin(field.annotation) is tuple:
        kind, default = list[str], list(default) if default else None
    annotation = Annotated[kind | None, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
