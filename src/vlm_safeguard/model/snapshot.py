"""A snapshot of a model: what it is made of at one moment, to notice that it was changed since.

Modules, parameters and adapters' switches are known by identity, address and version counter. What
is written by way of `weight.data` counts no version, so a few entries of each are kept, too. All
of that is compared before every prompt, so it has to be cheap: no method of a module is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.adapters import tuner_layers

_ENTRIES = 8  # of each tensor


class Switches(NamedTuple):
    """All that decides which of a tuner layer's adapters act, and how strongly."""

    active: str | tuple[str, ...]
    disabled: bool
    merged: tuple[str, ...]
    scaling: tuple[tuple[str, float], ...]
    chosen_for_each_row: int  # hooks, as adapter_names=… puts them on


class Snapshot:
    """Of a model as it is now. Weights that accelerate offloads are not watched: they move."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take it."""
        self._paths: list[str] = []  # of each table
        self._tables: list[dict[str, Any]] = []
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._held: list[Any] = []  # what is in each slot
        names: dict[str, torch.Tensor] = {}
        for path, module in model.named_modules():
            for table in _watched(module):
                self._paths.append(path)
                self._tables.append(table)
                self._slots += ((table, key) for key in table)
                self._held += table.values()
                tensors = {k: each for k, each in table.items() if isinstance(each, torch.Tensor)}
                names |= {f"{path}.{key}": tensor for key, tensor in tensors.items()}
        self._sizes = list(map(len, self._tables))
        plain = {k: each for k, each in names.items() if not _is_wrapper(each)}
        counted = {k: each for k, each in names.items() if not each.is_inference()}
        self._addresses = _Marks(plain, torch.Tensor.data_ptr)
        self._versions = _Marks(counted, lambda tensor: tensor._version)
        self._views = _views(plain)
        self._entries = list(map(torch.cat, self._views))
        layers = list(tuner_layers(model))
        self._tuned = {path: vars(layer) for path, layer in layers}
        self._switches = list(map(_switches, self._tuned.values()))

    def check(self) -> None:
        """Refuse the model if it was changed.

        Raises:
            SafeguardError: what was.
        """
        switches = list(map(_switches, self._tuned.values()))
        if switches != self._switches:
            changes = zip(self._tuned, self._switches, switches, strict=True)
            path, then, now = next(each for each in changes if each[1] != each[2])
            name = next(n for n in Switches._fields if getattr(then, n) != getattr(now, n))
            raise _changed(
                f"The adapters of {path} were changed after attaching ({name.replace('_', ' ')}: "
                f"{getattr(then, name)!r}, now {getattr(now, name)!r})"
            )
        present = [table.get(key) for table, key in self._slots]
        if list(map(len, self._tables)) != self._sizes or not all(map(is_, present, self._held)):
            raise _changed(f"Parts of {self._replaced_in()} were replaced after attaching")
        for marks in (self._addresses, self._versions):
            if (written := marks.changed()) is not None:
                raise _changed(f"{written} was written to after attaching")
        if not all(map(torch.equal, map(torch.cat, self._views), self._entries)):
            raise _changed("Weights were written to after attaching")

    def _replaced_in(self) -> str:
        """The module that holds other things than it did."""
        start = 0
        for path, table, size in zip(self._paths, self._tables, self._sizes, strict=True):
            held = self._held[start : start + size]
            if len(table) != size or not all(map(is_, table.values(), held)):
                return path or "the model"
            start += size
        raise AssertionError("one of them was changed")


class _Marks:
    """What a function gives for each of some named tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor], mark: Any) -> None:
        self._names, self._tensors, self._mark = list(tensors), list(tensors.values()), mark
        self._marks = list(map(mark, self._tensors))

    def changed(self) -> str | None:
        """The first tensor for which it gives something else now."""
        marks = list(map(self._mark, self._tensors))
        if marks == self._marks:
            return None
        each = zip(self._names, marks, self._marks, strict=True)
        return next(name for name, now, then in each if now != then)


def _is_wrapper(tensor: object) -> bool:
    """Whether a tensor holds others instead of data of its own."""
    return is_traceable_wrapper_subclass(tensor)


def _watched(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Its tables of parts and parameters, and of buffers where these may be packed weights."""
    if module._modules:
        yield module._modules
    held = [each for each in module._parameters.values() if each is not None]
    if held and not any(each.is_meta for each in held):
        yield module._parameters
    buffers = [each for each in module._buffers.values() if each is not None]
    if any(each.dim() > 1 and not each.is_floating_point() for each in buffers):
        yield module._buffers


@torch.no_grad()
def _views(tensors: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """A few entries of each, by device and dtype: views, which show what is written later."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors.values():
        if tensor.is_contiguous():
            middle = tensor.detach().view(-1)[tensor.numel() // 2 :][:_ENTRIES]
            groups.setdefault((tensor.device, tensor.dtype), []).append(middle)
    return list(groups.values())


def _switches(layer: dict[str, Any]) -> Switches:
    """Of a tuner layer, by its attributes."""
    active = layer["_active_adapter"]
    return Switches(
        active if isinstance(active, str) else tuple(active),
        layer.get("_disable_adapters", False),
        tuple(layer.get("merged_adapters", ())),
        tuple(layer.get("scaling", {}).items()),
        len(layer["_forward_pre_hooks"]),
    )


def _changed(what: str) -> SafeguardError:
    return SafeguardError(
        f"{what}, so nothing is generated. Leave the `with` block, change the model, and attach "
        "a guard that was fitted for it as it then is."
    )
