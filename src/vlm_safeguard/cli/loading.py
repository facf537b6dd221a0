"""What several commands share: options, and where people read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

ModelName = Annotated[
    str,
    typer.Argument(help="'pocket', 'coder', a Hugging Face Hub id, or a checkpoint folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Dtype = Annotated[str, typer.Option(help="Weights' type: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps, …")]


def console(as_json: bool) -> Console:
    """Where people read: standard output, or standard error where that holds JSON."""
    from rich.console import Console

    return Console(stderr=as_json)
