"""Loading the Pocket VLM: the base LLM plus the trained parts that come with the package."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.pocket.architecture import make_model, make_processor
from vlm_safeguard.pocket.base import base_folder

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

NAME = "pocket"
PARTS = ("vision_tower", "multi_modal_projector")


def trained_parts() -> Path:
    """The shipped weights: tower, projector, and the LLM's low-rank updates, float16."""
    return Path(str(files("vlm_safeguard.pocket").joinpath("weights", "pocket.safetensors")))


def fingerprint() -> str:
    """SHA-256 of the shipped weights; says which Pocket VLM this is."""
    return hashlib.sha256(trained_parts().read_bytes()).hexdigest()


def load(
    dtype: torch.dtype | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The Pocket VLM and its processor, plain transformers objects, on the CPU.

    Args:
        dtype: of the weights; `preferred_dtype()` by default.

    Raises:
        SafeguardError: the base weights are not on this machine and cannot be fetched.
    """
    from safetensors.torch import load_file

    weights = trained_parts()
    if not weights.is_file():
        raise SafeguardError(f"The package lacks {weights}; reinstall it.")
    base = base_folder()
    processor = make_processor(base)
    dtype = preferred_dtype() if dtype is None else dtype
    model = make_model(base, processor.image_token_id, dtype)
    apply_parts(model, load_file(weights))
    model.config._name_or_path = model.name_or_path = NAME
    return model, processor


def apply_parts(model: LlavaForConditionalGeneration, tensors: dict[str, torch.Tensor]) -> None:
    """Write the trained parts into a fresh model, in place: W + b a for each low-rank update."""
    for part in PARTS:
        state = {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{part}.")
        }
        if state:
            getattr(model.model, part).load_state_dict(state)
    for name, a in tensors.items():
        if name.endswith(".a"):
            module = model.get_submodule(name.removesuffix(".a"))
            update = tensors[f"{name.removesuffix('a')}b"].float() @ a.float()
            module.weight.data = (module.weight.data.float() + update).to(module.weight.dtype)


def preferred_dtype() -> torch.dtype:
    """bfloat16 on CPUs that multiply it natively, about twice as fast; else float32."""
    import torch

    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def export(folder: Path) -> None:
    """Write an ordinary checkpoint folder that any engine that reads LLaVA loads.

    Raises:
        SafeguardError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SafeguardError(f"{folder} is not empty; name a new folder.")
    model, processor = load()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
