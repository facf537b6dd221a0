"""A snapshot of a model: what it is made of at one moment, to notice that it was changed since.

Compared before every prompt and after every answer, so it has to be cheap: no method of a module
is called. Adapters' switches, which move most easily, are compared before every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter, is_not
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.adapters import Switches, tuner_layers
from vlm_safeguard.model.entries import spread_entries
from vlm_safeguard.model.parallel import own_part

_ENTRIES = 16  # of each tensor
_VERSION: Callable[[torch.Tensor], int] = attrgetter("_version")


class Snapshot:
    """Of a model as it is now. Weights that accelerate offloads are not watched: they move."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take it."""
        self._tables = [
            (path, table, dict(table))
            for path, module in model.named_modules()
            for table in _tables(module)
        ]
        tensors = {
            f"{path}.{name}": own_part(held)
            for path, _, table in self._tables
            for name, held in table.items()
            if isinstance(held, torch.Tensor)
        }
        self._marks = [
            _Marks({k: t for k, t in tensors.items() if not _is_wrapper(t)}, torch.Tensor.data_ptr),
            _Marks({k: t for k, t in tensors.items() if not t.is_inference()}, _VERSION),
        ]
        self._views = _views(list(tensors.values()))
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
        for marks in self._marks:
            if (name := marks.changed()) is not None:
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


class _Marks:
    """What a function gives for each of some named tensors: their addresses, or versions."""

    def __init__(self, tensors: dict[str, torch.Tensor], mark: Callable[[torch.Tensor], int]):
        self._tensors, self._mark = tensors, mark
        self._marks = list(map(mark, tensors.values()))

    def changed(self) -> str | None:
        """The first tensor for which it gives something else now."""
        marks = list(map(self._mark, self._tensors.values()))
        if marks == self._marks:
            return None
        each = zip(self._tensors, marks, self._marks, strict=True)
        return next(name for name, now, before in each if now != before)


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
