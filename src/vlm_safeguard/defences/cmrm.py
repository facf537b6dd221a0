"""CMRM (arXiv 2410.09047): take back the mean shift that an image causes.

ĥ_l = h_l − (α/n) v_l with v_l = mean[h_l(x, blank) − h_l(x)], in the paper's dataset-level form:
the mean is over the anchors, at their last token, measured once when the guard was fitted. It is
taken from every token, of the prompt and of the answer, in each of n layers: what is taken stays
out of the residual stream, so that α is what all layers add up to. (Taken whole in each of the
Pocket VLM's 20 layers, it leaves no language.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from vlm_safeguard.defences.defence import Answer, generate_answers
from vlm_safeguard.defences.steering import adding, steered
from vlm_safeguard.model.conversation import Chat, images_of

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.vlm import VLM

STRENGTH = 1.0


@dataclass(frozen=True, eq=False)
class CMRM:
    """No pass but the answer's. A conversation without an image is answered as it is.

    Attributes:
        drift: (layers, hidden) v, of every decoder layer.
        layers: those whose states are shifted back.
        strength: α, shared out among the layers.
    """

    drift: torch.Tensor
    layers: tuple[int, ...]
    strength: float = STRENGTH

    name: ClassVar[str] = "cmrm"

    @classmethod
    def of(cls, guard: Guard, *, strength: float = STRENGTH) -> Self:
        """With a fitted guard's drift and layers."""
        return cls(guard.policy.drift, guard.policy.layers, strength)

    @contextmanager
    def applied(self, vlm: VLM, chats: Sequence[Chat]) -> Iterator[Sequence[Chat]]:
        """See `InPasses.applied`."""
        has_image = torch.tensor([bool(images_of(chat)) for chat in chats])
        shifts = {
            layer: adding(
                -self.strength / len(self.layers) * has_image[:, None] * self.drift[layer]
            )
            for layer in self.layers
        }
        with steered(vlm.backbone, shifts):
            yield chats

    @torch.no_grad()
    def generate(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        """See `Defence.generate`."""
        with self.applied(vlm, chats) as steered_chats:
            return generate_answers(vlm, steered_chats, **options)
