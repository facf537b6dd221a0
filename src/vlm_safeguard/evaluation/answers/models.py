"""Models by name, and how they answer under a defence by name; each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import cache, partial
from typing import Any, NamedTuple

from vlm_safeguard.defences.defence import Answer, generate_answers
from vlm_safeguard.defences.guarded import Guarded
from vlm_safeguard.defences.table import defences
from vlm_safeguard.defences.variants import tuned
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.language import text_answers
from vlm_safeguard.guard import Guard
from vlm_safeguard.loading import Loading, load_guard, load_language_model, load_model, sees
from vlm_safeguard.model.vlm import VLM, LanguageModel

#: Answers a batch of conversations, with options of `generate`.
Generate = Callable[..., list[Answer]]


class ModelName(NamedTuple):
    """Which model, and how it is loaded.

    Attributes:
        name: `pocket`, `coder`, a Hugging Face Hub id, or a checkpoint folder.
        loading: how it is loaded.
    """

    name: str
    loading: Loading

    @property
    def key(self) -> list[Any]:
        """All of it, as JSON holds it."""
        return [self.name, *astuple(self.loading)]

    @property
    def weights(self) -> list[Any]:
        """What its answers depend on, wherever it runs, as JSON holds it."""
        return [self.name, *self.loading.weights]


class DefenceName(NamedTuple):
    """Which defence, and its settings.

    Attributes:
        name: of `defences.table`.
        guard: a guard's folder or Hub id; None to fit one.
        strength: of `default`'s edit, where it is not to be the guard's own.
        threshold: what is added to the thresholds of `default`'s gate.
    """

    name: str = "none"
    guard: str | None = None
    strength: float | None = None
    threshold: float | None = None


@cache
def loaded(model: ModelName) -> VLM | LanguageModel:
    """A model: one that takes images where its config has a vision part.

    Raises:
        SafeguardError: no such model, or it does not load.
    """
    if sees(*model):
        return VLM(*load_model(*model))
    return LanguageModel(*load_language_model(*model))


def loaded_vlm(model: ModelName) -> VLM:
    """A model that takes images.

    Raises:
        SafeguardError: no such model, it does not load, or it takes none.
    """
    vlm = loaded(model)
    if isinstance(vlm, LanguageModel):
        raise SafeguardError(f"'{model.name}' takes no images, so there is nothing to defend.")
    return vlm


@cache
def answering(model: ModelName, defence: DefenceName) -> Generate:
    """How a model answers under a defence.

    Raises:
        SafeguardError: the model or the guard cannot be used, or there is nothing to defend.
    """
    if defence.name == "none":  # needs no guard
        answerer = loaded(model)
        if isinstance(answerer, LanguageModel):
            return partial(text_answers, answerer)
        return partial(generate_answers, answerer)
    vlm = loaded_vlm(model)
    guard = _guard(model, defence.guard)
    if (defence.strength, defence.threshold) != (None, None):
        moved = tuned(guard, strength=defence.strength, threshold=defence.threshold)
        return partial(Guarded(moved).generate, vlm)
    return partial(defences(guard, [defence.name])[defence.name].generate, vlm)


@cache
def _guard(model: ModelName, source: str | None) -> Guard:
    vlm = loaded_vlm(model)
    return load_guard(source, model.name, vlm.model, vlm.processor)


def release() -> None:
    """Let go of all models and guards, once nothing is asked any more."""
    for kept in (loaded, answering, _guard):
        kept.cache_clear()
