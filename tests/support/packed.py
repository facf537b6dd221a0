"""Weights kept in bytes, as loaders of quantized models keep them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration


class Packed(torch.nn.Module):
    """A linear layer or an embedding whose weight stays in bytes, as quantized loaders keep it."""

    def __init__(self, module: torch.nn.Linear | torch.nn.Embedding) -> None:
        super().__init__()
        weight = module.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        rounded = (weight / self.scale).round() + 128
        self.weight = torch.nn.Parameter(rounded.to(torch.uint8), requires_grad=False)
        self.bias = getattr(module, "bias", None)
        self.is_embedding = isinstance(module, torch.nn.Embedding)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_embedding:
            return (self.weight[x].float() - 128) * self.scale[x]
        return torch.nn.functional.linear(x, (self.weight.float() - 128) * self.scale, self.bias)


def pack(model: LlavaForConditionalGeneration) -> None:
    """Pack every linear layer and embedding of the decoder, and the head."""
    for parent in list(model.model.language_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear | torch.nn.Embedding):
                setattr(parent, name, Packed(child))
    model.lm_head = Packed(model.lm_head)  # type: ignore[assignment]
