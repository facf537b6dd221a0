"""InferAligner (arXiv 2401.11206): push a harmful request's states along the safety vector.

x′ = x + (α/n) g_l θ_l at every token, in each of n layers: what is added stays in the residual
stream, so that α is what all layers add up to. θ_l is the difference of the harmful and harmless
anchors' mean states in the aligned model, which for a vision-language model is its own language
model. The gate g_l is 1 where the last prompt token's state lies on the harmful side of the
anchors' middle along θ_l, for each layer by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from vlm_safeguard.defences.defence import Answer, generate_answers
from vlm_safeguard.defences.steering import adding, steered
from vlm_safeguard.model.activations import capture_last_token

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.model.vlm import VLM

STRENGTH = 1.0


@dataclass(frozen=True, eq=False)
class InferAligner:
    """One pass that reads the prompts and sets the gates, and the pushed one that answers.

    Attributes:
        direction: (layers, hidden) θ, of every decoder layer.
        threshold: (layers,) value of θ_l·h_l above which the gate is open.
        layers: those that are pushed.
        strength: α, shared out among the layers.
    """

    direction: torch.Tensor
    threshold: torch.Tensor
    layers: tuple[int, ...]
    strength: float = STRENGTH

    name: ClassVar[str] = "inferaligner"

    @classmethod
    def of(cls, guard: Guard, *, strength: float = STRENGTH) -> Self:
        """With a fitted guard's means and layers; thresholds halfway between the means."""
        harmful, harmless = (
            guard.policy.directions.harmful_mean,
            guard.policy.directions.harmless_mean,
        )
        direction = harmful - harmless
        middle = (harmful + harmless) / 2
        return cls(direction, (direction * middle).sum(1), guard.policy.layers, strength)

    @contextmanager
    def applied(self, vlm: VLM, chats: Sequence[Chat]) -> Iterator[Sequence[Chat]]:
        """See `InPasses.applied`. The gates stay as the given images set them."""
        backbone = vlm.backbone
        with capture_last_token(backbone) as states:
            # through generate, which counts the positions of padded rows as it does for the answer
            vlm.model.generate(**vlm.encode(chats), max_new_tokens=1, do_sample=False)
        pushes = {}
        for layer in self.layers:
            theta = self.direction[layer].to(states[layer].device)
            along = states[layer].to(torch.promote_types(states[layer].dtype, theta.dtype))
            is_open = along @ theta.to(along.dtype) > float(self.threshold[layer])
            pushes[layer] = adding(self.strength / len(self.layers) * is_open[:, None] * theta)
        with steered(backbone, pushes):
            yield chats

    @torch.no_grad()
    def generate(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        """See `Defence.generate`."""
        with self.applied(vlm, chats) as pushed_chats:
            return generate_answers(vlm, pushed_chats, **options)
