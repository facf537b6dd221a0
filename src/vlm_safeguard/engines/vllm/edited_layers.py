"""Hooks on vLLM's decoder layers, which edit chosen rows of the states towards given coordinates.

They go on before the model is compiled, and are traced into its graphs: one masked edit a layer,
over buffers whose contents change and whose shapes do not, so that graphs hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vlm_safeguard.engines.vllm.marks import EditSettings
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.edits import Edit, edit_from_config
from vlm_safeguard.policy.subspace import Subspace


class EditedLayers:
    """Those among a worker's decoder layers that the policy edits.

    Attributes:
        numbers: of those that this worker has.
        rank: coordinates of a state.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        settings: EditSettings,
        *,
        hidden_size: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        """Hook them. Nothing can be edited before they are given their subspaces.

        Args:
            layers: all decoder layers; those of another worker's stage are placeholders.
            capacity: tokens that one pass may hold.
        """
        self.rank = rank = settings.rank
        hook = _hook(edit_from_config(settings.edit))
        # a state's row in a pass that is edited as a prompt's last token is
        self._last = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._buffers: dict[int, dict[str, torch.Tensor]] = {}
        self._filled: set[int] = set()
        self._planned = False
        for number in settings.layers:
            layer = layers[number]
            if not any(True for _ in layer.parameters()):
                continue  # of another stage
            buffers = {
                "V": torch.zeros(rank, hidden_size, device=device),
                "harmful": torch.zeros(rank, device=device),
                "drift": torch.zeros(rank, device=device),
                "seen": torch.zeros(capacity, rank, device=device),
                "text": torch.zeros(capacity, rank, device=device),
                "asked": torch.zeros(capacity, dtype=torch.bool, device=device),
                "done": torch.zeros(capacity, dtype=torch.bool, device=device),
                "last": self._last,
            }
            for name, buffer in buffers.items():
                layer.register_buffer(_named(name), buffer, persistent=False)
            layer.register_forward_hook(hook, prepend=True)  # who else looks sees edited states
            self._buffers[number] = buffers
        self.numbers = tuple(self._buffers)

    def fill(self, subspaces: Mapping[int, Subspace]) -> None:
        """Take the layers' subspaces, in which their edits work."""
        for number, buffers in self._buffers.items():
            for name in ("V", "harmful", "drift"):
                buffers[name].copy_(getattr(subspaces[number], name))
            self._filled.add(number)

    def begin(self) -> None:
        """A pass is put together; nothing of it is edited or seen yet."""
        if self._planned:
            for buffers in self._buffers.values():
                buffers["asked"].zero_()
            self._last.zero_()
        self._planned = False

    def look(self) -> None:
        """Coordinates of the pass are read, too."""
        for buffers in self._buffers.values():
            buffers["seen"].fill_(torch.nan)

    def plan(self, layer: int, rows: torch.Tensor, text: torch.Tensor, last: torch.Tensor) -> None:
        """Edit rows of the next pass in one layer.

        Args:
            rows: (n,) of the pass's flattened states.
            text: (n, m) coordinates of their counterparts in the text-only pass.
            last: (n,) bool: edited as a prompt's last token is.

        Raises:
            SafeguardError: the layer was not given its subspace.
        """
        if layer not in self._filled:
            raise SafeguardError(f"Layer {layer} was given no subspace to edit in.")
        buffers = self._buffers[layer]
        if not self._planned:
            for each in self._buffers.values():
                each["done"].zero_()
        self._planned = True
        rows = rows.to(self._last.device)
        buffers["text"][rows] = text.to(self._last.device)
        buffers["asked"][rows] = True
        self._last[rows] = last.to(self._last.device)

    def check(self) -> None:
        """Refuse a pass in which not just what was planned was edited.

        Raises:
            SafeguardError: in which layers.
        """
        if not self._planned:
            return
        off = [n for n, x in self._buffers.items() if not torch.equal(x["done"], x["asked"])]
        if off:
            raise SafeguardError(
                f"In layers {off} of vLLM's model, states that were to be edited were not, or not "
                "to what is finite, so nothing more is answered."
            )

    def unseen(self, count: int) -> dict[int, torch.Tensor]:
        """Layer → (count, m), of no numbers: coordinates that are yet to be read."""
        return {number: torch.full((count, self.rank), torch.nan) for number in self.numbers}

    def seen(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """(n, m) coordinates of rows of the pass that was made; not finite where it was missed."""
        return self._buffers[layer]["seen"][rows.to(self._last.device)].cpu()


def _named(name: str) -> str:
    return f"guard_edit_{name}"


def _hook(edit: Edit) -> Callable[[Any, Any, Any], Any]:
    """What is done behind each layer: see `Edit`."""

    def act(layer: Any, arguments: Any, output: Any) -> Any:
        hidden, residual = output  # a state is their sum
        count = hidden.shape[0]
        subspace = Subspace(layer.guard_edit_V, layer.guard_edit_harmful, layer.guard_edit_drift)
        z = (hidden + residual).to(subspace.V.dtype) @ subspace.V.mT
        layer.guard_edit_seen[:count].copy_(z)
        asked = layer.guard_edit_asked[:count]
        at = subspace.reference(layer.guard_edit_text[:count], layer.guard_edit_last[:count])
        shift = edit.shift(z, at)
        layer.guard_edit_done[:count].copy_(asked & torch.isfinite(shift).all(1))
        edited = (hidden.to(shift.dtype) + shift @ subspace.V).to(hidden.dtype)
        return torch.where(asked[:, None], edited, hidden), residual

    return act
