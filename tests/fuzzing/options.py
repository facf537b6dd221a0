"""Values for every option of `generate`: usual ones, and some that the library refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CompileConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from tiny.pocket import make_model, make_processor


@dataclass(frozen=True)
class Made:
    """An object that is made anew for every call, by its name in `MAKERS`."""

    name: str


@cache
def _tokenizer() -> Any:
    return make_processor().tokenizer


@cache
def _draft() -> Any:
    return make_model(make_processor(), seed=1, layers=2).double()


def _cooler(ids: Tensor, scores: Tensor) -> Tensor:
    return scores / 2


def _up_to_300(row: int, ids: Tensor) -> list[int]:
    return list(range(300))


#: What an object-valued option may be.
MAKERS: dict[str, Callable[[], Any]] = {
    "tokenizer": _tokenizer,
    "draft": lambda: copy.deepcopy(_draft()),
    "criteria": lambda: StoppingCriteriaList([MaxLengthCriteria(30)]),
    "cooler": lambda: [_cooler],
    "up to 300": lambda: _up_to_300,
    "compiling": CompileConfig,
    "watermark": WatermarkingConfig,
    "loop of its own": lambda: lambda *args, **kwargs: None,
}


def made(options: dict[str, Any]) -> dict[str, Any]:
    """The options with their objects."""
    return {
        name: MAKERS[value.name]() if isinstance(value, Made) else value
        for name, value in options.items()
    }


def some(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def rarely(share: int) -> st.SearchStrategy[bool]:
    """Once in so many times, hypothesis's love of what is least notwithstanding."""
    return st.sampled_from([False] * (share - 1) + [True])


ids = st.integers(5, 400)
switch = st.booleans()

#: Of every option that a guard lets in, but for those by which a case gives its prompt.
ALLOWED: dict[str, st.SearchStrategy[Any]] = {
    # lengths and stopping
    "max_length": st.integers(1, 60),
    "max_new_tokens": st.integers(0, 6),
    "min_length": st.integers(0, 40),
    "min_new_tokens": st.integers(0, 6),
    "max_time": some(1e6, 0.0),
    "early_stopping": some(True, False, "never", "soon"),
    "stop_strings": some("a", ["e", "in"], []),
    "stopping_criteria": some(Made("criteria"), []),
    # how a token is chosen from the logits
    "do_sample": switch,
    "num_beams": st.integers(0, 3),
    "num_return_sequences": st.integers(1, 3),
    "temperature": some(0.5, 1.0, 1.7, 0.0, -1.0),
    "top_k": st.integers(0, 20),
    "top_p": some(0.1, 0.5, 1.0, 1.5),
    "min_p": some(0.0, 0.1, 2.0),
    "top_h": some(0.3, 0.9),
    "typical_p": some(0.2, 1.0),
    "epsilon_cutoff": some(0.0, 0.01),
    "eta_cutoff": some(0.0, 0.01),
    "repetition_penalty": some(1.0, 1.3, 0.5, -1.0),
    "length_penalty": some(-1.0, 0.0, 2.0),
    "diversity_penalty": some(0.0, 0.5),
    "no_repeat_ngram_size": st.integers(0, 3),
    "bad_words_ids": some([[5]], [[7, 8], [300]], [], [[]]),
    "suppress_tokens": st.lists(ids, max_size=3),
    "begin_suppress_tokens": st.lists(ids, max_size=3),
    "forced_eos_token_id": ids,
    "sequence_bias": some([[[5], 3.0]], {(7,): -1.0}, {}),
    "exponential_decay_length_penalty": some((2, 1.5), (0, 1.0)),
    "renormalize_logits": switch,
    "remove_invalid_values": switch,
    "watermarking_config": some(Made("watermark"), {"greenlist_ratio": 0.3}),
    "logits_processor": some(Made("cooler"), []),
    "prefix_allowed_tokens_fn": some(Made("up to 300")),
    # special tokens
    "bos_token_id": ids,
    "eos_token_id": ids | st.lists(ids, min_size=100, max_size=200),
    "pad_token_id": some(0, 1, 7, -1),
    "decoder_start_token_id": ids,
    # caches, compiling and reading in chunks
    "use_cache": switch,
    "cache_implementation": some(
        *("dynamic", "static", "offloaded", "offloaded_static", "sliding_window", "hybrid"),
        *("quantized", "dynamic_full", "nonsense"),
    ),
    "cache_config": some({"backend": "fp8"}, {"max_cache_len": 64}, {}),
    "max_cache_len": some(16, 256),
    "disable_compile": switch,
    "compile_config": some(Made("compiling")),
    "prefill_chunk_size": st.integers(1, 9),
    "low_memory": switch,
    # drafts
    "assistant_model": some(Made("draft")),
    "tokenizer": some(Made("tokenizer")),
    "assistant_tokenizer": some(Made("tokenizer")),
    "is_assistant": switch,
    "num_assistant_tokens": st.integers(1, 4),
    "num_assistant_tokens_schedule": some("constant", "heuristic", "heuristic_transient"),
    "assistant_confidence_threshold": some(0.0, 0.4),
    "assistant_lookbehind": st.integers(1, 4),
    "target_lookbehind": st.integers(1, 4),
    "prompt_lookup_num_tokens": st.integers(1, 3),
    "max_matching_ngram_size": st.integers(1, 3),
    # what is given back, and how
    "output_attentions": switch,
    "output_hidden_states": switch,
    "output_logits": switch,
    "output_scores": switch,
    "return_dict_in_generate": switch,
    "synced_gpus": some(None, False),
    "use_model_defaults": some(None, True, False),
    "transformers_version": some("5.0.0"),
    "_from_model_config": switch,
}

#: Set so that they do something.
REFUSED: dict[str, Any] = {
    "custom_generate": Made("loop of its own"),
    "trust_remote_code": True,
    "assistant_early_exit": 2,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "anything",
    "use_mtp": True,
    "guidance_scale": 1.5,
    "negative_prompt_ids": torch.ones(1, 1).long(),
    "negative_prompt_attention_mask": torch.ones(1, 1).long(),
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "constraints": ["x"],
    "force_words_ids": [[5]],
    "forced_bos_token_id": 5,
    "encoder_no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.2,
    "token_healing": True,
    "continuous_batching_config": {"a": 1},
    "inputs_embeds": torch.zeros(1, 1, 32).double(),
    "decoder_input_ids": torch.ones(1, 1).long(),
    "encoder_outputs": ["x"],
}

#: What a model's passes take beside its prompt, that a caller may give.
INPUTS: dict[str, Any] = {
    "position_ids": torch.arange(3)[None],
    "labels": torch.ones(1, 3).long(),
    "logits_to_keep": 2,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "full",
    "image_sizes": torch.tensor([[32, 32]]),
    "output_router_logits": True,
}

UNKNOWN: dict[str, Any] = {
    "next_years_option": 1,
    "assistant_models": ["x"],
    "Max_new_tokens": 3,
    "cross_attention_ids": torch.ones(1, 1).long(),
}


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    """What one call is given beside its prompt: few options, now and then one that is refused."""
    names: Iterable[str] = draw(st.lists(some(*ALLOWED), max_size=5, unique=True))
    options = {"max_new_tokens": draw(st.integers(1, 5))}
    options |= {name: draw(ALLOWED[name]) for name in names}
    for table, share in ((REFUSED, 12), (INPUTS, 15), (UNKNOWN, 25)):
        if draw(rarely(share)):
            name = draw(some(*table))
            options[name] = table[name]
    return options
