"""A snapshot of a model: what it is made of at one moment, to notice that it was changed since.

It holds no copy: modules, parameters and adapters' switches are known by identity, address and
version counter, so that it is compared in a fraction of a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.adapters import tuner_layers


class Snapshot:
    """Of a model as it is now. Weights that accelerate offloads are not watched: they move."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take it."""
        self._tables: list[tuple[str, dict[str, Any], list[int]]] = []
        self._kept: list[Any] = []  # what is in the tables, lest an address is given anew
        self._names: list[str] = []
        self._tensors: list[torch.Tensor] = []
        for path, module in model.named_modules():
            for table in (module._modules, *_watched(module)):
                self._tables.append((path, table, list(map(id, table.values()))))
                self._kept += table.values()
                for name, held in table.items():
                    if isinstance(held, torch.Tensor):
                        self._names.append(f"{path}.{name}")
                        self._tensors.append(held)
        self._marks = list(map(_mark, self._tensors))
        self._adapters = [(path, layer, _switches(layer)) for path, layer in tuner_layers(model)]

    def check(self) -> None:
        """Refuse the model if it was changed.

        Raises:
            SafeguardError: what was.
        """
        for path, layer, switches in self._adapters:
            if (present := _switches(layer)) != switches:
                name = next(name for name in switches if present[name] != switches[name])
                raise _changed(
                    f"The adapters of {path} were changed after attaching ({name}: "
                    f"{switches[name]!r}, now {present[name]!r})"
                )
        for path, table, held in self._tables:
            if list(map(id, table.values())) != held:
                raise _changed(f"Parts of {path or 'the model'} were replaced after attaching")
        if list(map(_mark, self._tensors)) != self._marks:
            marks = zip(self._names, self._tensors, self._marks, strict=True)
            name = next(name for name, tensor, mark in marks if _mark(tensor) != mark)
            raise _changed(f"{name} was written to after attaching")


def _watched(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Its table of parameters, and that of its buffers where these may be packed weights."""
    held = [each for each in module._parameters.values() if each is not None]
    if held and not any(each.is_meta for each in held):
        yield module._parameters
    buffers = [each for each in module._buffers.values() if each is not None]
    if any(each.dim() > 1 and not each.is_floating_point() for each in buffers):
        yield module._buffers


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its data lies, and how often it was written to."""
    address = 0 if is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()
    return address, 0 if tensor.is_inference() else tensor._version


def _switches(layer: Any) -> dict[str, Any]:
    """All that decides which of a tuner layer's adapters act, and how strongly."""
    return {
        "active": layer._active_adapter
        if isinstance(layer._active_adapter, str)
        else tuple(layer._active_adapter),
        "disabled": layer._disable_adapters,
        "merged": tuple(getattr(layer, "merged_adapters", ())),
        "scaling": dict(getattr(layer, "scaling", {})),
        "chosen for each row": len(layer._forward_pre_hooks),  # as adapter_names=… does it
    }


def _changed(what: str) -> SafeguardError:
    return SafeguardError(
        f"{what}, so nothing is generated. Leave the `with` block, change the model, and attach "
        "a guard that was fitted for it as it then is."
    )
