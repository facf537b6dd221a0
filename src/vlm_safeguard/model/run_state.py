"""What the modules of some families keep of a `generate` between its tokens.

It is by how much an image shifts the positions behind it; no verified family keeps more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def run_state_aside(model: torch.nn.Module) -> Iterator[None]:
    """Keep it while another `generate` runs, and bring it back."""
    kept = [(module, module.rope_deltas) for module in _keepers(model)]
    try:
        yield
    finally:
        for module, shift in kept:
            module.rope_deltas = shift


def shift_nothing(model: torch.nn.Module, device: torch.device) -> None:
    """Set it as behind a text without an image."""
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    for module in _keepers(model):
        module.rope_deltas = zero


def _keepers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "rope_deltas")]
