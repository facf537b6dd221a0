"""Wrappers around a model: those that a guard acts through are taken off, others are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.parallel import check_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ITSELF = "Give the model itself, as from_pretrained returns it"
_COMPILED = (
    "runs a compiled graph, in which hooks do not act. Give the model that was not compiled, and "
    'let generate compile it: generate(cache_implementation="static", '
    "compile_config=CompileConfig())"
)
_SHARDED = (
    "shards and gathers the weights around every pass, which the guard's own passes do not go "
    f"through. {_ITSELF}, one in each process, or spread over devices by device_map"
)
#: What cannot be guarded, by the name of a class among a wrapper's own and its bases, and why.
_REFUSED = {
    "OptimizedModule": _COMPILED,
    "DataParallel": (
        "copies the model to several GPUs in every pass, and copies are not guarded. Give its "
        ".module, spread over the GPUs by device_map"
    ),
    "FullyShardedDataParallel": _SHARDED,
    "FSDPModule": _SHARDED,
    "DeepSpeedEngine": f"runs passes of its own. {_ITSELF} (the engine's .module)",
    "InferenceEngine": f"replaces the model's layers by its own kernels. {_ITSELF}",
    "PeftMixedModel": (
        "mixes adapters of several kinds. Merge them into the model (merge_and_unload) and fit a "
        "guard for what that gives"
    ),
    "Pipeline": "is a pipeline. Give the model inside it, pipe.model: the pipeline then uses it",
}


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside `model`.

    A `PeftModel` and a `DistributedDataParallel` call the model inside them as it is, so a guard
    on that one acts through them.

    Raises:
        SafeguardError: no transformers model, or one in a wrapper that a guard does not act
            through, and what to give instead.
    """
    from transformers import PreTrainedModel

    while not isinstance(model, PreTrainedModel) or _named(model, *_REFUSED):
        if (kind := _named(model, *_REFUSED)) is not None:
            raise SafeguardError(f"{type(model).__name__} {_REFUSED[kind]}.")
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif _named(model, "PeftModel"):
            model = _adapted(model)
        else:
            raise SafeguardError(_unknown(model))
    if model._compiled_call_impl is not None:
        raise SafeguardError(f"After model.compile(), {type(model).__name__} {_COMPILED}.")
    if hasattr(model, "_original_forward"):
        raise SafeguardError(
            "Accelerate's mixed precision wraps this model's forward in autocast, which the "
            "guard's text-only pass does not go through. Load the model in bfloat16 and prepare "
            'it with Accelerator(mixed_precision="no").'
        )
    check_plan(model)
    return model


def _named(model: Any, *names: str) -> str | None:
    """The first of these names that a class of `model`, or a base of it, has.

    By name, as most of these classes are of packages that need not be installed.
    """
    classes = {each.__name__ for each in type(model).__mro__}
    return next((name for name in names if name in classes), None)


def _adapted(model: Any) -> Any:
    """The model that a `PeftModel` put adapter layers into.

    Raises:
        SafeguardError: its adapter adds tokens or passes, which a guard does not see.
    """
    kinds = {config.peft_type.value for config in model.peft_config.values()}
    if not _named(model.base_model, "BaseTuner") or _named(model.base_model, "XLoraModel"):
        raise SafeguardError(
            f"The adapter of this {type(model).__name__} ({', '.join(sorted(kinds))}) does not "
            "change layers only: it puts learnt tokens or passes of its own around the request, "
            "which the guard cannot read. Use an adapter such as LoRA, or the model without it."
        )
    return model.get_base_model()


def _unknown(model: Any) -> str:
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        return (
            f"{name} is not a transformers model. Give one that "
            "AutoModelForImageTextToText.from_pretrained loaded."
        )
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return (
                f"{name} is a wrapper that is not known to call the model inside it as it is. "
                f"Give that model (its .{path}), and generate with it."
            )
    return (
        f"{name} is not a transformers model: it has no config. Load it with "
        "AutoModelForImageTextToText.from_pretrained."
    )
