"""Small random models of every verified family, each with a processor, made here from nothing.

One file a group of relatives; `@tiny("model_type")` registers a function that returns the model
(float32, in eval mode) and its processor, whose chat template writes what the family's own writes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vlm_safeguard.anchors import shipped_anchors

Maker = Callable[[], tuple[PreTrainedModel, Any]]
TINY: dict[str, Maker] = {}
M = TypeVar("M", bound=Maker)
Model = TypeVar("Model", bound=PreTrainedModel)


def tiny(model_type: str) -> Callable[[M], M]:
    """Register the maker of a small model of this type."""

    def register(maker: M) -> M:
        TINY[model_type] = maker
        return maker

    return register


def load_makers() -> dict[str, Maker]:
    """Every registered maker, by model type."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(TINY.items()))


#: Of each way in which families lay out images, text and caches, one.
_SHOWN = ("gemma3", "gemma4", "idefics3", "llava", "mllama", "paligemma", "qwen2_vl", "qwen3_vl")


def each_family() -> list[Any]:
    """Every model type as a test's parameter."""
    return [family_param(name) for name in load_makers()]


def family_param(model_type: str, *values: Any) -> Any:
    """A model type, and more, as a test's parameters; `make test` takes one of each kind."""
    marks = () if model_type in _SHOWN else pytest.mark.thorough
    return pytest.param(model_type, *values, marks=marks)


def train_tokenizer(special: Sequence[str], size: int = 400) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on the shipped anchors.

    Args:
        special: its first tokens.
        size: how many others it has.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for anchor in shipped_anchors() for text in (anchor.harmful, anchor.harmless)]
    tokenizer.train_from_iterator([*texts, "user\nassistant\n"], trainer)
    return tokenizer


def make_tokenizer(
    special: Sequence[str],
    *,
    bos: str | None = None,
    eos: str = "</s>",
    pad: str = "<pad>",
    **named: str,
) -> PreTrainedTokenizerFast:
    """A tokenizer that pads on the left.

    Args:
        special: special tokens, besides bos, eos and pad.
        named: tokens that processors ask the tokenizer for, e.g. `image_token="<image>"`.
    """
    every = dict.fromkeys([pad, *([bos] if bos else []), eos, *special, *named.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(list(every)),
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=list(special),
        extra_special_tokens=named,
        padding_side="left",
    )


def make(model_class: type[Model], config: Any) -> Model:
    """A random model from its config, with weights large enough to tell states apart."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model
