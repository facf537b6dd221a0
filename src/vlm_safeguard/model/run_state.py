"""What the modules of some families keep of a `generate` between its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def run_state_aside(model: torch.nn.Module) -> Iterator[None]:
    """Keep it while another `generate` runs, and bring it back.

    It is by how much an image shifts the positions behind it; no verified family keeps more.
    """
    kept = [(each, each.rope_deltas) for each in model.modules() if hasattr(each, "rope_deltas")]
    try:
        yield
    finally:
        for module, shift in kept:
            module.rope_deltas = shift
