"""Hooks on decoder layers, for the baselines that edit activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.activations import hidden_states, with_hidden_states
from vlm_safeguard.model.backbone import Backbone

Steer = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def steered(backbone: Backbone, layers: Mapping[int, Steer]) -> Iterator[None]:
    """While open, these layers put out what their functions make of their states, pass by pass.

    Args:
        layers: layer → function of (rows, tokens, hidden) states, which gives as many.

    Raises:
        SafeguardError: on leaving, where a layer never ran: what was generated is not steered.
    """
    ran: set[int] = set()

    def hook(layer: int, steer: Steer) -> Any:
        def on_output(module: torch.nn.Module, args: Any, output: Any) -> Any:
            ran.add(layer)
            states = hidden_states(output, backbone.streams_at)
            return with_hidden_states(output, steer(states), backbone.streams_at)

        return on_output

    handles = [
        backbone.layers[layer].register_forward_hook(hook(layer, steer))
        for layer, steer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if silent := sorted(set(layers) - ran):
        raise SafeguardError(f"Layers {silent} never ran, so this answer was not steered there.")


def adding(shift: torch.Tensor) -> Steer:
    """A function for `steered` that adds a row's shift to each of its tokens, read or generated.

    Args:
        shift: (rows, hidden); where a batch holds several beams of each row, all get the row's.
    """

    def steer(states: torch.Tensor) -> torch.Tensor:
        copies = len(states) // len(shift)
        rows = shift.to(states.device, states.dtype).repeat_interleave(copies, dim=0)
        return states + rows[:, None]

    return steer
