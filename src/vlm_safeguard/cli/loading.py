"""What the commands are given by name: models, guards and images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from vlm_safeguard.guard import Guard

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


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model, processor) by name.

    Raises:
        SafeguardError: no such model, not a vision-language model, or it does not load.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from vlm_safeguard import pocket

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    types = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16,
             "float16": torch.float16}  # fmt: skip
    if dtype not in types:
        raise SafeguardError(f"There is no dtype '{dtype}'; choose one of {', '.join(types)}.")
    if name in pocket.FAMILY:
        model, processor = pocket.load(types[dtype], name=name)
    else:
        try:
            processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=types[dtype] or "auto")
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise SafeguardError(_why_not_loaded(name, error)) from error
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:
        raise SafeguardError(f"The device '{device}' cannot be used: {_first(error)}") from error


def _why_not_loaded(name: str, error: Exception) -> str:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return (
            f"There is no model '{name}' here: it is not a checkpoint folder, and the Hugging "
            f"Face Hub did not give it ({_first(error)})"
        )
    if getattr(config, "vision_config", None) is None:
        return f"'{name}' is not a vision-language model (its type is '{config.model_type}')."
    return f"'{name}' could not be loaded: {_first(error)}"


def load_guard(source: Path | None, name: str, model: Any, processor: Any) -> Guard:
    """The guard in folder or repository `source`; without one, fitted now.

    A reference VLM's is kept in the cache, so that it is fitted once.
    """
    from vlm_safeguard import __version__
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.pocket import FAMILY
    from vlm_safeguard.pocket.base import cache_folder
    from vlm_safeguard.pocket.model import fingerprint

    if source is not None:
        return Guard.from_pretrained(source)
    if name not in FAMILY:
        print("No --guard given: fitting one for this run (vlm-safeguard fit keeps it).",
              file=sys.stderr)  # fmt: skip
        return Guard.fit(model, processor)
    kind = str(model.dtype).removeprefix("torch.")
    kept = cache_folder() / f"{name}-guard-{__version__}-{fingerprint(name)[:12]}-{kind}"
    if (kept / "guard_config.json").is_file():
        return Guard.from_pretrained(kept)
    print(f"Fitting a guard for the {FAMILY[name].title}, once …", file=sys.stderr)
    guard = Guard.fit(model, processor)
    guard.save_pretrained(kept)
    return guard


def load_image(path: Path) -> Image:
    """An RGB picture from a file.

    Raises:
        SafeguardError: no such file, or not a picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise SafeguardError(f"There is no image {path}.") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise SafeguardError(f"{path} cannot be read as an image: {_first(error)}") from error


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
