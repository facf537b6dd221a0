"""`vlm-safeguard pocket`: the reference VLMs as checkpoints, and how they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_safeguard.cli.loading import Device

app = typer.Typer(
    help="The Pocket VLM and the Coder VLM: export one, or train it again.", no_args_is_help=True
)
Model = Annotated[str, typer.Option(help="Which one: 'pocket' or 'coder'.")]


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    model: Model = "pocket",
) -> None:
    """Write an ordinary checkpoint that transformers and other engines load."""
    from vlm_safeguard import pocket
    from vlm_safeguard.pocket.family import member

    pocket.export(folder, name=model)
    print(f"{member(model).title} written to {folder}")


@app.command("train")
def train(
    folder: Annotated[Path, typer.Argument(help="Folder for checkpoints; resumed if it exists.")],
    model: Model = "pocket",
    out: Annotated[
        Path | None, typer.Option(help="Weights file; FOLDER/MODEL.safetensors by default.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a reference VLM from its base model (minutes on a GPU, hours on 2 cores)."""
    from vlm_safeguard.pocket.family import member

    vlm = member(model)
    from vlm_safeguard.loading import find_device
    from vlm_safeguard.pocket.recipe.build import build

    weights = folder / f"{model}.safetensors" if out is None else out
    build(vlm, folder, weights, str(find_device(device)))
    print(f"Weights written to {weights}")
