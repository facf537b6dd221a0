"""The door: what of `generate` is let in, and the other doors, which stay shut."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, Never

import torch

from vlm_safeguard.engines.hooks.options import check_options, setting
from vlm_safeguard.engines.hooks.passes import Prompt
from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Other doors to generation, which do not pass through `generate`.
OTHER_DOORS = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)


class Door:
    """Attributes of a model that a guard replaces, and brings back as they were."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is replaced yet."""
        self._model = model
        self._before: dict[str, Any] = {}

    def replace(self, name: str, function: Callable[..., Any]) -> None:
        """Set an attribute of the model itself."""
        self._before[name] = vars(self._model).get(name)
        setattr(self._model, name, function)

    def restore(self) -> None:
        """Bring back what was there."""
        for name, before in self._before.items():
            vars(self._model).pop(name, None)
            if before is not None:
                setattr(self._model, name, before)
        self._before = {}


def named_options(
    model: PreTrainedModel, args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """All that `generate` was given, by name."""
    bound = signature(type(model).generate).bind_partial(model, *args, **options).arguments
    given = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
    more: dict[str, Any] = bound.get("kwargs", {})
    return given | more


def open_prompt(model: PreTrainedModel, options: dict[str, Any]) -> Prompt:
    """What `generate` was given to continue.

    Args:
        options: all that it was given, by name.

    Raises:
        SafeguardError: an option, or a way of giving the prompt, that cannot be guarded.
    """
    check_options(model, options)
    ids = options.get("input_ids", options.get("inputs"))
    if not isinstance(ids, torch.Tensor):
        raise SafeguardError(
            "generate was called without input_ids: the text-only view of the request cannot be "
            "known, so nothing is generated."
        )
    if ids.shape[:1] == (0,):
        raise SafeguardError("generate was given no request: input_ids has no row.")
    mask = options.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise SafeguardError(
            f"generate was given {ids.shape[-1]} tokens and an attention_mask for "
            f"{mask.shape[-1]}. Give it the whole conversation's tokens, also where a cache "
            "already holds some: the guard judges the whole."
        )
    return Prompt(ids, mask)


def reads_in_chunks(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Whether `generate` reads the prompt in several passes."""
    return setting(model, options, "prefill_chunk_size") is not None


def preparing(prepare: Callable[..., Any], note: Callable[[torch.Tensor, int | None], None]) -> Any:
    """A model's preparation of a pass of `generate`, by which `note` is told what is written.

    Args:
        note: takes (rows, tokens) ids so far, and how many of them the pass reads if that is known.
    """

    @wraps(prepare)  # generate reads its signature
    def prepare_inputs(input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        inputs = prepare(input_ids, *args, **options)
        ids = inputs.get("input_ids")
        note(input_ids, None if ids is None else ids.shape[1])
        return inputs

    return prepare_inputs


def uncompiled_where(
    model: PreTrainedModel, compiled_call: Callable[..., Any], hooked: Callable[[], bool]
) -> Any:
    """A model's compiled call, but for passes whose layers carry hooks.

    Args:
        compiled_call: gives the compiled model, for a config.
        hooked: whether the pass that comes next is such a one.
    """

    def get(*args: Any, **options: Any) -> Any:
        compiled = compiled_call(*args, **options)

        def call(*inputs: Any, **named: Any) -> Any:
            return (model if hooked() else compiled)(*inputs, **named)

        return call

    return get


def refuse_door(*args: Any, **options: Any) -> Never:
    """In the place of the other doors.

    Raises:
        SafeguardError: always.
    """
    raise SafeguardError(
        "Continuous batching does not pass through the model's own forward, so the guard "
        "cannot act there. Use generate; nothing was generated."
    )
