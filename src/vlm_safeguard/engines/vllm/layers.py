"""Hooks on vLLM's decoder layers, which read chosen rows of the states into fixed buffers.

They go on before the model is compiled, and are traced into its graphs: one gather a layer, whose
shapes do not depend on what is asked, so that graphs hold. Without graphs it gathers what is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlm_safeguard.errors import SafeguardError

_ROWS, _STATES = "guard_rows", "guard_states"  # a layer's buffers


class WatchedLayers:
    """The watched ones among a worker's decoder layers."""

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        watched: Sequence[int],
        *,
        hidden_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Hook them.

        Args:
            layers: all decoder layers; those of another worker's stage are placeholders.
            watched: their numbers.
            capacity: rows that one pass may be asked for.
        """
        self._rows = torch.zeros(capacity, dtype=torch.long, device=device)
        self._states: dict[int, torch.Tensor] = {}
        self._asked = 0
        for number in watched:
            layer = layers[number]
            if not any(True for _ in layer.parameters()):
                continue  # of another stage
            states = torch.zeros(capacity, hidden_size, dtype=dtype, device=device)
            layer.register_buffer(_ROWS, self._rows, persistent=False)
            layer.register_buffer(_STATES, states, persistent=False)
            layer.register_forward_hook(self._read)
            self._states[number] = states

    def choose(self, rows: Sequence[int]) -> None:
        """Read these rows of the next pass; none of them is read before it is made.

        Raises:
            SafeguardError: they are more than there is room for.
        """
        if len(rows) > len(self._rows):
            raise SafeguardError(
                f"{len(rows)} rows are asked for; there is room for {len(self._rows)}."
            )
        self._asked = len(rows)
        self._rows.zero_()
        self._rows[: len(rows)] = torch.tensor(rows, dtype=torch.long)
        for states in self._states.values():
            states[: len(rows)] = torch.nan

    def forget(self) -> None:
        """Read nothing: rows of a shorter pass would not be there."""
        self._asked = 0
        self._rows.zero_()

    def read(self, place: int) -> dict[int, torch.Tensor]:
        """Layer → (hidden,) states of the `place`-th chosen row; not finite where it was missed."""
        return {number: states[place].clone() for number, states in self._states.items()}

    def _read(self, layer: Any, arguments: Any, output: Any) -> None:
        """A state is the sum of what a layer adds and of what it was added to."""
        hidden, residual = output
        rows, states = getattr(layer, _ROWS), getattr(layer, _STATES)
        if not _in_graph(states):
            rows, states = rows[: self._asked], states[: self._asked]
        states.copy_(hidden.index_select(0, rows) + residual.index_select(0, rows))


def _in_graph(states: torch.Tensor) -> bool:
    """Whether what is done now is traced or captured, to be done again as it is."""
    if torch.compiler.is_compiling():
        return True
    return states.is_cuda and torch.cuda.is_current_stream_capturing()
