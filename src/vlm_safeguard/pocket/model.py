"""Loading a reference VLM: the base LLM plus the trained parts that come with the package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.pocket.architecture import make_model, make_processor
from vlm_safeguard.pocket.family import POCKET, member

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PARTS = ("vision_tower", "multi_modal_projector")


def fingerprint(name: str = POCKET.name) -> str:
    """SHA-256 of the shipped weights; says which Pocket or Coder VLM this is."""
    return hashlib.sha256(member(name).weights().read_bytes()).hexdigest()


def load(
    dtype: torch.dtype | None = None, *, name: str = POCKET.name
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A reference VLM and its processor, plain transformers objects, on the CPU.

    Args:
        dtype: of the weights; `preferred_dtype()` by default.
        name: "pocket" or "coder".

    Raises:
        SafeguardError: no such VLM, or its base weights are not on this machine and cannot be
            fetched.
    """
    from safetensors.torch import load_file

    vlm = member(name)
    if not vlm.weights().is_file():
        raise SafeguardError(f"The package lacks {vlm.weights()}; reinstall it.")
    base = vlm.base.folder()
    processor = make_processor(base, vlm.system)
    dtype = preferred_dtype() if dtype is None else dtype
    model = make_model(base, processor.image_token_id, dtype)
    apply_parts(model, load_file(vlm.weights()))
    model.config._name_or_path = model.name_or_path = name
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
            module: Any = model.get_submodule(name.removesuffix(".a"))
            update = tensors[f"{name.removesuffix('a')}b"].float() @ a.float()
            weight = module.weight.data
            module.weight.data = (weight.float() + update.to(weight.device)).to(weight.dtype)


def preferred_dtype() -> torch.dtype:
    """bfloat16 on CPUs that have tiles for it (AMX), about twice as fast there; else float32.

    Where AVX-512 alone multiplies it, it is slower: reading texts takes 1.5 times as long.
    """
    import torch

    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def export(folder: Path, *, name: str = POCKET.name) -> None:
    """Write an ordinary checkpoint folder that any engine that reads LLaVA loads.

    Raises:
        SafeguardError: the folder is not empty, or the VLM cannot be loaded.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SafeguardError(f"{folder} is not empty; name a new folder.")
    save(*load(name=name), folder)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a LLaVA and its processor into a folder, its weights named as they are published."""
    model.save_pretrained(folder)
    _name_as_published(folder / "model.safetensors")
    processor.save_pretrained(folder)


def _name_as_published(file: Path) -> None:
    """Name the vision tower's weights as LLaVA's published checkpoints do, for other engines.

    transformers reads both names, and since 5.19 writes shorter ones that vLLM does not know.
    """
    from safetensors.torch import load_file, save_file

    short, published = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        name.replace(short, published, 1)
        if name.startswith(short) and not name.startswith(published)
        else name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
