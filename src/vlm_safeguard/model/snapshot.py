"""A snapshot of a model: what it is made of at one moment, to notice that it was changed since.

Compared before every prompt and after every answer, so it has to be cheap: no method of a module
is called. Adapters' switches, which move most easily, are compared before every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_not
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.adapters import Switches, tuner_layers
from vlm_safeguard.model.entries import spread_entries

_ENTRIES = 16  # of each tensor


class Snapshot:
    """Of a model as it is now. Weights that accelerate offloads are not watched: they move."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take it."""
        self._tables = [
            (path, table, dict(table))
            for path, module in model.named_modules()
            for table in _tables(module)
        ]
        self._tensors = [
            (f"{path}.{name}", tensor, _mark(tensor))
            for path, _, held in self._tables
            for name, tensor in held.items()
            if isinstance(tensor, torch.Tensor)
        ]
        self._views = _views([tensor for _, tensor, _ in self._tensors])
        self._entries = list(map(torch.cat, self._views))
        self._layers = [
            (path, vars(layer), Switches.of(vars(layer))) for path, layer in tuner_layers(model)
        ]

    def check_adapters(self) -> None:
        """Refuse the model if an adapter was switched, merged, scaled, added or taken away.

        Raises:
            SafeguardError: which layer's.
        """
        for path, layer, before in self._layers:
            if (present := Switches.of(layer)) != before:
                raise _changed(
                    f"The adapters of {path} were changed after attaching "
                    f"({before.difference(present)})"
                )

    def check(self) -> None:
        """Refuse the model if it was changed.

        A write by way of `weight.data` counts no version, so a few entries are compared, too.

        Raises:
            SafeguardError: what was.
        """
        self.check_adapters()
        for path, table, before in self._tables:
            if len(table) != len(before) or any(map(is_not, table.values(), before.values())):
                raise _changed(f"Parts of {path or 'the model'} were replaced after attaching")
        for name, tensor, mark in self._tensors:
            if _mark(tensor) != mark:
                raise _changed(f"{name} was written to after attaching")
        if not all(map(torch.equal, map(torch.cat, self._views), self._entries)):
            raise _changed("Weights were written to after attaching")


def _tables(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Its parts, its parameters, and its buffers where they are saved with it, not caches."""
    saved = module._buffers.keys() - module._non_persistent_buffers_set
    for table in (module._modules, module._parameters, module._buffers if saved else {}):
        if table and not any(getattr(each, "is_meta", False) for each in table.values()):
            yield table


def _is_wrapper(tensor: object) -> bool:
    """Whether a tensor holds others instead of data of its own."""
    return is_traceable_wrapper_subclass(tensor)


def _mark(tensor: torch.Tensor) -> tuple[int | None, int | None]:
    """Address and version; None where a tensor has none of its own, or counts none."""
    return (
        None if _is_wrapper(tensor) else tensor.data_ptr(),
        None if tensor.is_inference() else tensor._version,
    )


@torch.no_grad()
def _views(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """A few entries of each, by device and dtype: views, which show what is written later."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.is_contiguous() and not _is_wrapper(tensor):
            entries = spread_entries(tensor, _ENTRIES)
            groups.setdefault((tensor.device, tensor.dtype), []).append(entries)
    return list(groups.values())


def _changed(what: str) -> SafeguardError:
    return SafeguardError(
        f"{what}, so nothing is returned. Leave the `with` block, change the model, and attach "
        "a guard that was fitted for it as it then is."
    )
