"""Forward hooks on decoder layers, for the length of one pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.activations import hidden_states, with_hidden_states
from vlm_safeguard.model.backbone import Backbone

#: Takes a layer and its (rows, tokens, hidden) output; gives another one, or None to leave it.
Act = Callable[[int, torch.Tensor], torch.Tensor | None]


class LayerHooks:
    """Puts an action on layers, takes it off, and knows whether each of them took part.

    Attributes:
        in_pass: whether a pass is under way for which they were armed, with or without layers.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._handles: list[Any] = []
        self._fired: list[int] = []
        self.in_pass = False
        self._thread = threading.get_ident()

    def arm(self, layers: Sequence[int] = (), act: Act = lambda layer, hidden: None) -> None:
        """A pass begins: hook these layers until `disarm`, none where nothing is to be done."""
        self.disarm()
        for layer in layers:
            handle = self._backbone.layers[layer].register_forward_hook(
                self._hook(layer, act),
                prepend=True,  # whoever else looks sees the edited state
            )
            self._handles.append(handle)
        self.in_pass, self._thread = True, threading.get_ident()

    def disarm(self) -> None:
        """Take the hooks off, whether or not they fired."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._fired, self.in_pass = [], [], False

    def check_all_took_part(self, layers: Sequence[int], where: str) -> None:
        """Refuse a pass in which not each of these layers, and no other hooked one, ran once.

        Raises:
            SafeguardError: and which did.
        """
        if sorted(self._fired) != list(layers):
            raise SafeguardError(
                f"Of the guarded layers {list(layers)}, only {sorted(self._fired)} took part in "
                f"{where}: a hook was removed or a layer replaced after attaching. Attach again."
            )

    def _hook(self, layer: int, act: Act) -> Any:
        streams_at = self._backbone.streams_at

        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != self._thread:
                return None  # a pass that another thread began before the guard came on
            self._fired.append(layer)
            edited = act(layer, hidden_states(output, streams_at))
            return None if edited is None else with_hidden_states(output, edited, streams_at)

        return hook
