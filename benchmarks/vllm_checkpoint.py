"""What is served in vLLM: a reference VLM's checkpoint, or a stand-in with longer images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_safeguard import Guard
from vlm_safeguard.loading import kept_guard
from vlm_safeguard.pocket import load
from vlm_safeguard.pocket.model import save
from vlm_safeguard.policy.edits import Refuse
from vlm_safeguard.policy.response import Response

_GRID = 24  # patches a side of the stand-in's images: 576 tokens, as LLaVA-1.5's


def checkpoint(folder: Path, name: str = "pocket", *, large: bool = False) -> tuple[Path, Path]:
    """Folders of a reference VLM's checkpoint and of its default guard.

    Args:
        large: a stand-in whose images are 576 tokens: the same language model behind a tower whose
            place embeddings are drawn anew.
    """
    model_folder, guard_folder = folder / "model", folder / "guard"
    if guard_folder.is_dir():
        return model_folder, guard_folder
    model, processor = load(torch.float32, name=name)
    guard = kept_guard(name, model, processor)
    if large:
        guard = _enlarge(model, processor, guard, model_folder)
    else:
        save(model, processor, model_folder)
    guard.save_pretrained(guard_folder)
    return model_folder, guard_folder


def editing(guard: Path) -> Path:
    """Folder of the guard that edits open requests beside their images, behind the same gate."""
    made = guard.with_name("editing")
    if not made.is_dir():
        default = Guard.from_pretrained(guard)
        default.variant(response=Response.EDIT, edit=Refuse()).save_pretrained(made)
    return made


def _enlarge(model: Any, processor: Any, guard: Guard, folder: Path) -> Guard:
    """Save the stand-in; the guard as it reads that."""
    side = _GRID * model.config.vision_config.patch_size
    vision = CLIPVisionConfig(**{**model.config.vision_config.to_dict(), "image_size": side})
    config = LlavaConfig(
        **{**model.config.to_dict(), "vision_config": vision, "image_seq_length": _GRID**2}
    )
    stand_in = LlavaForConditionalGeneration(config)
    weights = {k: v for k, v in model.state_dict().items() if "position_embedding" not in k}
    stand_in.load_state_dict(weights, strict=False)
    stand_in.generation_config = model.generation_config
    processor.image_processor.size = {"height": side, "width": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    save(stand_in, processor, folder)
    (token,) = guard.policy.text_view.placeholder_ids
    view = replace(guard.policy.text_view, counted=(token, _GRID**2))
    return guard.variant(text_view=view)
