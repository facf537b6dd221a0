"""What is given by name: models, guards and images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.guard import Guard


_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model, processor) by name.

    Raises:
        SafeguardError: no such model, not a vision-language model, or it does not load.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlm_safeguard import pocket

    chosen = _dtype(dtype)
    model: PreTrainedModel
    processor: ProcessorMixin
    if name in pocket.FAMILY:
        model, processor = pocket.load(chosen, name=name)
    else:
        try:
            processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=chosen or "auto")
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise SafeguardError(_why_not_loaded(name, error)) from error
    return _placed(model, device), processor


def load_language_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of a language model that takes no images, by name.

    Raises:
        SafeguardError: no such model, or it does not load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = _dtype(dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen or "auto")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise SafeguardError(_why_not_loaded(name, error, needs_vision=False)) from error
    return _placed(model, device), tokenizer


def sees(name: str) -> bool:
    """Whether the model of this name takes images; False where its config cannot be read."""
    from transformers import AutoConfig

    from vlm_safeguard.pocket import FAMILY

    if name in FAMILY:
        return True
    try:
        return getattr(AutoConfig.from_pretrained(name), "vision_config", None) is not None
    except (OSError, ValueError, KeyError):
        return False


def check_dtype(dtype: str) -> None:
    """Refuse a name that is no dtype.

    Raises:
        SafeguardError: with those that there are.
    """
    if dtype not in _DTYPES:
        raise SafeguardError(f"There is no dtype '{dtype}'; choose one of {', '.join(_DTYPES)}.")


def _dtype(name: str) -> torch.dtype | None:
    """A dtype by name; None for what the weights were saved in."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_dtype(name)
    return None if name == "auto" else getattr(torch, name)


def _placed(model: Any, device: str) -> Any:
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise SafeguardError(f"The device '{device}' cannot be used: {_first(error)}") from error


def _why_not_loaded(name: str, error: Exception, *, needs_vision: bool = True) -> str:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return (
            f"There is no model '{name}' here: it is not a checkpoint folder, and the Hugging "
            f"Face Hub did not give it ({_first(error)})"
        )
    if needs_vision and getattr(config, "vision_config", None) is None:
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
    from vlm_safeguard.policy.artifact import FORMAT

    if source is not None:
        return Guard.from_pretrained(source)
    if name not in FAMILY:
        print(
            "No --guard given: fitting one for this run (vlm-safeguard fit keeps it).",
            file=sys.stderr,
        )
        return Guard.fit(model, processor)
    kind = f"{fingerprint(name)[:12]}-{str(model.dtype).removeprefix('torch.')}"
    kept = cache_folder() / f"{name}-guard-{__version__}-format{FORMAT}-{kind}"
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
