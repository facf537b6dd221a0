"""The options of `vlm-safeguard eval`: a plan's fields, with their help and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from vlm_safeguard.evaluation.plan import BenchmarkPlan, Plan


def plan_options() -> Iterator[Parameter]:
    """The command's parameters for a plan, in the plan's order.

    A field that holds several values is an option of one value that can be repeated: `defences`
    is `--defence`. `--condition` is that of every benchmark that is named.
    """
    for name, field in Plan.model_fields.items():
        if name == "model":
            yield _parameter(name, field, typer.Argument(help=field.description))
        elif name != "frontier":  # too much for a command line
            yield _option(name, field)
        if name == "benchmarks":
            yield _option("conditions", BenchmarkPlan.model_fields["conditions"])


def _option(name: str, field: FieldInfo) -> Parameter:
    several = get_origin(field.annotation) is tuple
    flag = f"--{(name.removesuffix('s') if several else name).replace('_', '-')}"
    help_text = f"{field.description} Can be repeated." if several else field.description
    return _parameter(name, field, typer.Option(flag, help=help_text))


def _parameter(name: str, field: FieldInfo, info: Any) -> Parameter:
    """One parameter; the plan itself checks what is more than numbers, text, yes or no."""
    default = None if field.is_required() else field.get_default()
    kind: Any = int if int in (field.annotation, *get_args(field.annotation)) else str
    if field.annotation is bool:
        kind = bool
    if get_origin(field.annotation) is tuple:
        kind, default = list[str], list(default) if default else None
    annotation = Annotated[kind | None, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
