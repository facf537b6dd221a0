"""Projector pre-training: image tokens that read like a description, without running the LLM.

Image token i is drawn towards the LLM's word embedding of the i-th token of a sentence that
describes the scene: a start from which the frozen LLM can already read images a little.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, mse_loss, normalize

from vlm_safeguard.pocket.model import PARTS
from vlm_safeguard.pocket.recipe.loop import autocast, train
from vlm_safeguard.pocket.recipe.tower import DEVELOPMENT_SEED, pixels
from vlm_safeguard.pocket.scenes import Scene

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

STEPS = 400
BATCH = 96
LEARNING_RATE = 1e-3
_FIRST_SCENE = 2_000_000
_SHARPNESS = 20.0  # of the softmax over words by cosine


def trainable_parts(model: LlavaForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    """Freeze the model but for its tower and projector; returns their parameters by name."""
    model.requires_grad_(False)
    trained = {
        f"{part}.{name}": parameter
        for part in PARTS
        for name, parameter in getattr(model.model, part).named_parameters()
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def train_projector(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    *,
    steps: int = STEPS,
) -> None:
    """Train tower and projector (float32) in place."""
    trained = trainable_parts(model)
    length = model.config.image_seq_length
    filler = processor.tokenizer.encode("\n")[0]

    def words(scenes: list[Scene]) -> torch.Tensor:
        rows = [processor.tokenizer.encode(scene.description())[:length] for scene in scenes]
        padded = [row + [filler] * (length - len(row)) for row in rows]
        return torch.tensor(padded, device=model.device)

    known = torch.unique(words([Scene.from_seed(seed) for seed in range(3000)]))
    embeddings = model.get_input_embeddings().weight.detach().float()[known]
    directions = normalize(embeddings, dim=-1)

    def image_tokens(scenes: list[Scene]) -> torch.Tensor:
        with autocast(model.device):
            seen = pixels(processor, scenes).to(model.device)
            states = model.model.vision_tower(seen).last_hidden_state[:, 1:]
            tokens: torch.Tensor = model.model.multi_modal_projector(states)
        return tokens.float()

    def loss_at(step: int) -> torch.Tensor:
        scenes = [Scene.from_seed(_FIRST_SCENE + step * BATCH + i) for i in range(BATCH)]
        target = torch.searchsorted(known, words(scenes))
        tokens = image_tokens(scenes)
        alike = normalize(tokens, dim=-1) @ directions.mT
        guess = cross_entropy(_SHARPNESS * alike.flatten(0, 1), target.flatten())
        distance = mse_loss(tokens, embeddings[target]) / embeddings.square().mean()
        loss: torch.Tensor = guess + distance
        return loss

    @torch.inference_mode()
    def after_step(step: int) -> str:
        if step % 100:
            return ""
        scenes = [Scene.from_seed(DEVELOPMENT_SEED + i) for i in range(300)]
        alike = normalize(image_tokens(scenes), dim=-1) @ directions.mT
        right = known[alike.argmax(-1)] == words(scenes)
        return f"whole descriptions right {right.all(1).float().mean():.2f}"

    train(
        "projector",
        trained,
        loss_at,
        steps=steps,
        learning_rate=LEARNING_RATE,
        folder=folder,
        after_step=after_step,
    )
