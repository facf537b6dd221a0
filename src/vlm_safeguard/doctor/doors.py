"""Whether the doors to generation that do not pass the guard are shut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlm_safeguard.doctor.hooking import hooked
from vlm_safeguard.doctor.subject import QUESTIONS, Subject, require
from vlm_safeguard.errors import SafeguardError


@torch.no_grad()
def doors_shut(subject: Subject) -> str:
    """Each is refused before a layer of the decoder runs."""
    model, backbone = subject.model, subject.backbone
    inputs = subject.inputs(QUESTIONS[:1], images=0)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeddings = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    doors: dict[str, Callable[[], Any]] = {
        "generate(guidance_scale=2.0)": lambda: model.generate(
            **inputs, guidance_scale=2.0, max_new_tokens=1
        ),
        "generate(inputs_embeds=…)": lambda: model.generate(**embeddings, max_new_tokens=1),
        "the decoder alone": lambda: backbone.decoder(input_ids=ids, attention_mask=mask),
    }
    passes: list[str] = []

    def count(module: torch.nn.Module, args: Any, output: Any) -> None:
        passes.append("of the first layer")

    with hooked(backbone.layers, {0: count}), subject.guard.attach(model):
        for name, door in doors.items():
            passes.clear()
            require(_is_shut(door), f"{name} is answered")
            require(not passes, f"{name} is refused, but only after a pass")
    return f"refused before a pass: {', '.join(doors)}"


def _is_shut(door: Callable[[], Any]) -> bool:
    try:
        door()
    except SafeguardError:
        return True
    return False
