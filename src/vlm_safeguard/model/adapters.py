"""Adapters (LoRA and its kin) in a model: which act, and which parameters are theirs.

PEFT puts tuner layers into the model, around its own layers, whether through a `PeftModel` or by
`model.add_adapter`. They are known by their attributes, as PEFT need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


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


def acting_parameters(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """Every parameter that acts, tied ones under each name: the name, its module, the name there.

    What a tuner layer or torch.compile wraps has the name it had before; adapters that do not act
    are left out.
    """
    layers = dict(tuner_layers(model))
    for path, module in model.named_modules(remove_duplicate=False):
        parts = path.split(".")
        prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)} if layers else set()
        acting = [active(layers[prefix]) for prefix in prefixes & layers.keys()]
        adapted = acting and not {"base_layer", "original_module"} & set(parts)
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            if adapted and not frozenset().union(*acting) & {*parts, own}:
                continue
            name = f"{path}.{own}" if path else own
            for wrapper in (".base_layer.", ".original_module.", "._orig_mod."):
                name = name.replace(wrapper, ".")
            yield name, module, own, parameter
