"""Adapters (LoRA and its kin) in a model: which act, how strongly, and which weights are theirs.

PEFT puts tuner layers into the model, around its own layers, whether through a `PeftModel` or by
`model.add_adapter`. They are known by their attributes, as PEFT need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch


class Switches(NamedTuple):
    """All that decides which of a tuner layer's adapters act, and how strongly."""

    active: str | tuple[str, ...]
    disabled: bool
    merged: tuple[str, ...]
    scaling: tuple[tuple[str, float], ...]
    chosen_for_each_row: int  # hooks, as adapter_names=… puts them on

    @classmethod
    def of(cls, layer: Mapping[str, Any]) -> Switches:
        """By the layer's attributes, which are read at every token."""
        active = layer["_active_adapter"]
        return cls(
            active if isinstance(active, str) else tuple(active),
            layer.get("_disable_adapters", False),
            tuple(layer.get("merged_adapters", ())),
            tuple(layer.get("scaling", {}).items()),
            len(layer["_forward_pre_hooks"]),
        )

    def difference(self, other: Switches) -> str:
        """The first that differs, before and now."""
        pairs = zip(self._fields, self, other, strict=True)
        name, before, now = next(each for each in pairs if each[1] != each[2])
        return f"{name.replace('_', ' ')}: {before!r}, now {now!r}"


def tuner_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of every layer that holds adapters."""
    for path, module in model.named_modules():
        if hasattr(module, "_active_adapter") and hasattr(module, "_disable_adapters"):
            yield path, module


def active(layer: Any) -> frozenset[str]:
    """Names of the adapters of one tuner layer that act: switched on, or merged."""
    named = layer._active_adapter
    chosen = () if layer._disable_adapters else (named,) if isinstance(named, str) else named
    return frozenset({*chosen, *getattr(layer, "merged_adapters", ())})


def active_adapters(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act anywhere in the model, in order."""
    return tuple(sorted({name for _, layer in tuner_layers(model) for name in active(layer)}))


def acting_weights(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """Every weight that acts, tied ones under each name: the name, its module, the name there.

    Weights are parameters and the buffers that are saved with them, but for counters. What a
    tuner layer or torch.compile wraps has the name it had before; adapters that do not act are
    left out.
    """
    layers = dict(tuner_layers(model))
    for path, module in model.named_modules(remove_duplicate=False):
        parts = path.split(".")
        prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)} if layers else set()
        acting = [active(layers[prefix]) for prefix in prefixes & layers.keys()]
        adapted = acting and not {"base_layer", "original_module"} & set(parts)
        caches = module._non_persistent_buffers_set
        for own, weight in chain(module._parameters.items(), module._buffers.items()):
            if weight is None or own in caches or weight.dtype in (torch.int64, torch.bool):
                continue
            if adapted and not frozenset().union(*acting) & {*parts, own}:
                continue
            name = f"{path}.{own}" if path else own
            for wrapper in (".base_layer.", ".original_module.", "._orig_mod."):
                name = name.replace(wrapper, ".")
            yield name, module, own, weight
