"""Tower pre-training: name a scene's attributes from its patches, without any language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from vlm_safeguard.pocket.recipe.loop import autocast, train
from vlm_safeguard.pocket.scenes import ATTRIBUTES, Scene

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, LlavaProcessor

STEPS = 1500
BATCH = 96
LEARNING_RATE = 1e-3
DEVELOPMENT_SEED = 9_000_000  # scenes that choices are made on; below the held-out ones


def pixels(processor: LlavaProcessor, scenes: list[Scene]) -> torch.Tensor:
    """(scenes, 3, 64, 64) normalised pixel values."""
    images = [scene.render() for scene in scenes]
    values: torch.Tensor = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return values


def train_tower(tower: CLIPVisionModel, processor: LlavaProcessor, folder: Path) -> None:
    """Train `tower` (a CLIPVisionModel, float32) in place; the heads are thrown away."""
    tower.requires_grad_(True)
    width = tower.config.hidden_size
    heads = torch.nn.ModuleDict(
        {name: torch.nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()}
    ).to(tower.device)

    def scores(scenes: list[Scene]) -> dict[str, torch.Tensor]:
        with autocast(tower.device):
            seen = pixels(processor, scenes).to(tower.device)
            states = tower(seen).last_hidden_state[:, 1:].mean(1)
        return {name: head(states.float()) for name, head in heads.items()}

    def targets(scenes: list[Scene], name: str) -> torch.Tensor:
        values = [getattr(scene, name) for scene in scenes]
        known = [-1 if v is None else ATTRIBUTES[name].index(v) for v in values]
        return torch.tensor(known, device=tower.device)

    def loss_at(step: int) -> torch.Tensor:
        scenes = [Scene.from_seed(step * BATCH + i) for i in range(BATCH)]
        return sum(
            cross_entropy(logits, targets(scenes, name), ignore_index=-1)
            for name, logits in scores(scenes).items()
        )  # type: ignore[return-value]

    @torch.inference_mode()
    def after_step(step: int) -> str:
        if step % 250:
            return ""
        scenes = [Scene.from_seed(DEVELOPMENT_SEED + i) for i in range(400)]
        notes = []
        for name, logits in scores(scenes).items():
            target = targets(scenes, name)
            right = (logits.argmax(1) == target)[target >= 0].float().mean()
            notes.append(f"{name} {right:.2f}")
        return ", ".join(notes)

    parameters = {
        **{f"tower.{n}": p for n, p in tower.named_parameters()},
        **{f"heads.{n}": p for n, p in heads.named_parameters()},
    }
    train(
        "tower",
        parameters,
        loss_at,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        folder=folder,
        after_step=after_step,
    )
