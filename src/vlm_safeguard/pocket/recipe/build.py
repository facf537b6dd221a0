"""Each recipe in order; every finished step is kept, so an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from vlm_safeguard.extras import require
from vlm_safeguard.pocket.architecture import make_model, make_processor
from vlm_safeguard.pocket.family import CODER, POCKET, Member
from vlm_safeguard.pocket.model import PARTS, apply_parts, preferred_dtype
from vlm_safeguard.pocket.recipe.alignment import RANK, align
from vlm_safeguard.pocket.recipe.projector import train_projector
from vlm_safeguard.pocket.recipe.soup import mean_updates
from vlm_safeguard.pocket.recipe.tower import train_tower
from vlm_safeguard.pocket.recipe.vision import train_everyday, train_questions

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

_SEED = 0
_ALIGNMENTS = 2
_CODER_PROJECTOR_STEPS = 1200
_CODER_STEPS = 480
_CODER_BATCH = 18
_CODER_LEARNING_RATE = 7e-5  # its embeddings are 8 times smaller; 5e-4 undid the projector


def build(vlm: Member, folder: Path, weights: Path, device: str = "cpu") -> None:
    """Train a reference VLM, with checkpoints in `folder`; what ships goes to `weights`.

    Minutes on a GPU; hours on 2 cores that multiply bfloat16 natively.

    Raises:
        SafeguardError: the base weights cannot be had.
        MissingExtraError: peft, which alignment needs, is not installed.
    """
    if vlm is POCKET:
        require("pocket", "peft")
    folder.mkdir(parents=True, exist_ok=True)
    base = vlm.base.folder()
    processor = make_processor(base, vlm.system)

    def fresh() -> LlavaForConditionalGeneration:
        torch.manual_seed(_SEED)
        return make_model(base, processor.image_token_id, _dtype(device)).to(device)

    tensors = _RECIPES[vlm.name](fresh, processor, folder)
    weights.parent.mkdir(parents=True, exist_ok=True)
    _save(tensors, weights, torch.float16)


def _build_pocket(
    fresh: Callable[[], LlavaForConditionalGeneration], processor: LlavaProcessor, folder: Path
) -> dict[str, torch.Tensor]:
    """Align the LLM on text, twice; then tower, projector, and both through the mean LLM."""
    alignments = []
    for seed in range(_ALIGNMENTS):
        aligned = folder / f"alignment-{seed}.safetensors"
        if not aligned.is_file():
            _save(align(fresh(), processor, folder, seed), aligned)
        alignments.append(load_file(aligned))
    mean = mean_updates(alignments, RANK)
    model = fresh()
    apply_parts(model, mean)
    _parts_in_float32(model)
    tower = folder / "tower.safetensors"
    if not tower.is_file():
        train_tower(model.model.vision_tower, processor, folder)
        _save(model.model.vision_tower.state_dict(), tower)
    model.model.vision_tower.load_state_dict(load_file(tower))
    train_projector(model, processor, folder)
    train_questions(model, processor, folder)
    train_everyday(model, processor, folder)
    return {**mean, **_trained(model)}


def _build_coder(
    fresh: Callable[[], LlavaForConditionalGeneration], processor: LlavaProcessor, folder: Path
) -> dict[str, torch.Tensor]:
    """From the Pocket VLM's tower: a projector, and both through the LLM, which stays as it is."""
    model = fresh()
    _parts_in_float32(model)
    pocket = load_file(POCKET.weights())
    apply_parts(model, {n: t for n, t in pocket.items() if n.startswith("vision_tower.")})
    train_projector(model, processor, folder, steps=_CODER_PROJECTOR_STEPS)
    train_questions(
        model,
        processor,
        folder,
        steps=_CODER_STEPS,
        batch=_CODER_BATCH,
        learning_rate=_CODER_LEARNING_RATE,
    )
    return _trained(model)


_RECIPES = {POCKET.name: _build_pocket, CODER.name: _build_coder}


def _dtype(device: str) -> torch.dtype:
    """Of the frozen weights."""
    return preferred_dtype() if device == "cpu" else torch.bfloat16


def _parts_in_float32(model: LlavaForConditionalGeneration) -> None:
    for part in PARTS:
        getattr(model.model, part).float()


def _trained(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in getattr(model.model, part).state_dict().items()
    }


def _save(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype = torch.float32) -> None:
    staged = path.with_suffix(".part")
    save_file({n: tensor.to("cpu", dtype).contiguous() for n, tensor in tensors.items()}, staged)
    staged.replace(path)
