"""Whether the decoder that was found is the one that text passes, and hooks on it act."""

from __future__ import annotations

from typing import Any

import torch

from vlm_safeguard.doctor.hooking import Hook, hooked
from vlm_safeguard.doctor.subject import QUESTIONS, Subject, require
from vlm_safeguard.policy.gate import GATES


def decoder_layers(subject: Subject) -> str:
    """Every layer takes part in a text pass, once and in order."""
    layers, path = subject.backbone.layers, subject.backbone.decoder_path
    order: list[int] = []

    def noting(layer: int) -> Hook:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            order.append(layer)

        return hook

    with hooked(layers, {n: noting(n) for n in range(len(layers))}), torch.no_grad():
        subject.model(**subject.inputs(QUESTIONS[:1], images=0))
    require(
        order == list(range(len(layers))),
        f"of {len(layers)} layers, {order} took part in a text pass",
    )
    return f"{len(layers)} layers in {path}, each once and in order"


def hooks_act(subject: Subject) -> str:
    """Attaching pushes each guarded layer's state in turn; the logits have to move."""
    guard = subject.guard.variant(gate=GATES["open"])
    with guard.attach(subject.model):
        pass
    first, *_, last = guard.policy.layers * 2
    return f"each of layers {first}-{last} moves the logits when pushed"
