"""`vlm-safeguard pocket`: the Pocket VLM as a checkpoint, and how it is made."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vlm_safeguard.errors import SafeguardError

app = typer.Typer(help="The Pocket VLM: export it, or train it again.", no_args_is_help=True)


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
) -> None:
    """Write an ordinary checkpoint that transformers and other engines load."""
    from vlm_safeguard.pocket import model

    model.export(folder)
    print(f"Pocket VLM written to {folder}")


@app.command("train")
def train(
    folder: Annotated[Path, typer.Argument(help="Folder for checkpoints; resumed if it exists.")],
    out: Annotated[
        Path | None, typer.Option(help="Weights file; FOLDER/pocket.safetensors by default.")
    ] = None,
) -> None:
    """Train the Pocket VLM from the base model (over an hour on 2 cores)."""
    if find_spec("peft") is None:  # asked for before an hour of work, not after
        raise SafeguardError("Training needs peft: pip install 'vlm-safeguard[train]'.")
    from vlm_safeguard.pocket.recipe.build import build

    weights = folder / "pocket.safetensors" if out is None else out
    build(folder, weights)
    print(f"Weights written to {weights}")
