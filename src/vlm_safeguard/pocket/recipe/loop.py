"""One training loop for every stage: AdamW, cosine schedule, checkpoints that resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from vlm_safeguard.pocket.model import preferred_dtype

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_CHECKPOINT_STEPS = 25
_CHECKPOINT_SECONDS = 300  # where that is sooner


def autocast(device: torch.device) -> torch.autocast:
    """Multiply in bfloat16 where the device does so natively; on other CPUs it is far slower."""
    native = device.type != "cpu" or preferred_dtype() is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def token_loss(
    model: LlavaForConditionalGeneration,
    states: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Sum over tokens of weight × cross-entropy of predicting that token from those before it.

    Args:
        states: (rows, tokens, hidden) final states of the language model.
        ids: (rows, tokens).
        weights: (rows, tokens) of the tokens to be predicted; the first of a row cannot be.
    """
    chosen = weights[:, 1:] > 0
    with autocast(states.device):
        logits = model.lm_head(states[:, :-1][chosen])
    losses = cross_entropy(logits.float(), ids[:, 1:][chosen], reduction="none")
    return (losses * weights[:, 1:][chosen]).sum()


def train(
    name: str,
    parameters: dict[str, torch.nn.Parameter],
    loss_at: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    folder: Path,
    after_step: Callable[[int], str] | None = None,
    weight_decay: float = 0.01,
) -> None:
    """Minimise `loss_at(step)` in place; continues from `folder/<name>.ckpt` where there is one.

    Args:
        loss_at: the loss of one step, a function of the step number alone, so that a resumed run
            sees the same batches.
        after_step: called after every step; what it returns is printed if not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.ckpt"
    weights = list(parameters.values())
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01
        ),
    )
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location=weights[0].device)
        start = state["step"]
        for key, parameter in parameters.items():
            parameter.data.copy_(state["parameters"][key])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    with tqdm(desc=name, total=steps, initial=start, unit="step") as progress:
        average = math.nan
        saved = time.monotonic()
        for step in range(start, steps):
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_at(step)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            value = float(loss.detach())
            average = value if math.isnan(average) else 0.95 * average + 0.05 * value
            progress.set_postfix(loss=f"{average:.3f}", refresh=False)
            progress.update()
            due = (step + 1) % _CHECKPOINT_STEPS == 0 or step + 1 == steps
            if due or time.monotonic() - saved > _CHECKPOINT_SECONDS:
                staged = checkpoint.with_suffix(".part")
                torch.save(
                    {
                        "step": step + 1,
                        "parameters": {k: p.data for k, p in parameters.items()},
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                    },
                    staged,
                )
                staged.replace(checkpoint)
                saved = time.monotonic()
            if after_step is not None and (note := after_step(step + 1)):
                progress.write(f"{name} step {step + 1}: loss {average:.3f}; {note}")
