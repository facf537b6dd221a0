"""The whole recipe in order; every finished step is kept, so an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from vlm_safeguard.pocket.architecture import make_model, make_processor
from vlm_safeguard.pocket.base import base_folder
from vlm_safeguard.pocket.model import PARTS, apply_parts, preferred_dtype
from vlm_safeguard.pocket.recipe.alignment import align
from vlm_safeguard.pocket.recipe.projector import train_projector
from vlm_safeguard.pocket.recipe.tower import train_tower
from vlm_safeguard.pocket.recipe.vision import train_vision

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_SEED = 0


def build(folder: Path, weights: Path) -> None:
    """Train everything, with checkpoints in `folder`, and write the parts that ship to `weights`.

    An hour or more on 2 cores that multiply bfloat16 natively.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = base_folder()
    processor = make_processor(base)

    def fresh() -> LlavaForConditionalGeneration:
        torch.manual_seed(_SEED)
        return make_model(base, processor.image_token_id, preferred_dtype())

    aligned = folder / "alignment.safetensors"
    if not aligned.is_file():
        _save(align(fresh(), processor, folder), aligned)
    model = fresh()
    apply_parts(model, load_file(aligned))
    for part in PARTS:
        getattr(model.model, part).float()
    tower = folder / "tower.safetensors"
    if not tower.is_file():
        train_tower(model.model.vision_tower, processor, folder)
        _save(model.model.vision_tower.state_dict(), tower)
    model.model.vision_tower.load_state_dict(load_file(tower))
    train_projector(model, processor, folder)
    train_vision(model, processor, folder)
    trained = {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in getattr(model.model, part).state_dict().items()
    }
    weights.parent.mkdir(parents=True, exist_ok=True)
    _save({**load_file(aligned), **trained}, weights, torch.float16)


def _save(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype = torch.float32) -> None:
    staged = path.with_suffix(".part")
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, staged)
    staged.replace(path)
