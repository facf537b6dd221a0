"""What `generate` may be given while a guard is attached: an allow-list.

Every field of a `GenerationConfig` and every argument of `generate` stands in one of the tables; a
test fails where the installed transformers has one that does not. What is not known is refused.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.cache import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Options under which every token that is chosen comes from the guarded model's own logits.
ALLOWED = frozenset(
    {
        # lengths and stopping
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
        *("early_stopping", "stop_strings", "stopping_criteria"),
        # how a token is chosen from the logits
        *("do_sample", "num_beams", "num_return_sequences", "temperature", "top_k", "top_p"),
        *("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
        *(
            "length_penalty",
            "diversity_penalty",
            "no_repeat_ngram_size",
            "bad_words_ids",
            "suppress_tokens",
        ),
        *("begin_suppress_tokens", "forced_eos_token_id", "sequence_bias"),
        *("exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values"),
        *("watermarking_config", "logits_processor", "prefix_allowed_tokens_fn"),
        # special tokens
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        # caches, compiling and reading in chunks
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "disable_compile"),
        *("compile_config", "prefill_chunk_size", "low_memory"),
        # drafts, each of which the guarded model accepts or not
        *("assistant_model", "tokenizer", "assistant_tokenizer", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
        # what is given back, and how
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("return_dict_in_generate", "streamer", "synced_gpus"),
        # the call itself
        *("inputs", "input_ids", "generation_config", "use_model_defaults", "kwargs", "self"),
        *("transformers_version", "_from_model_config"),
    }
)

_FROM_THE_HUB = "a way of decoding that transformers takes from a Hub repository"
_OF_ENCODERS = "an option of encoder-decoders, which are not guarded"
_SECOND_PROMPT = "guidance by a second prompt, which is not the request"
#: Options that are refused where they are set, and what they are.
REFUSED = {
    "custom_generate": "a decoding loop of your own",
    "trust_remote_code": "code from a Hub repository that decodes",
    "assistant_early_exit": "drafting with a part of the guarded model itself",
    "assistant_ensemble_weight": "accepting tokens of a draft that the guarded model would not say",
    "speculation_type": "a way of drafting that is not known to be checked token by token",
    "use_mtp": "drafting with heads of the guarded model itself",
    "guidance_scale": _SECOND_PROMPT,
    "negative_prompt_ids": _SECOND_PROMPT,
    "negative_prompt_attention_mask": _SECOND_PROMPT,
    "penalty_alpha": _FROM_THE_HUB,
    "dola_layers": _FROM_THE_HUB,
    "num_beam_groups": _FROM_THE_HUB,
    "constraints": _FROM_THE_HUB,
    "force_words_ids": _FROM_THE_HUB,
    "forced_bos_token_id": _OF_ENCODERS,
    "encoder_no_repeat_ngram_size": _OF_ENCODERS,
    "encoder_repetition_penalty": _OF_ENCODERS,
    "token_healing": "rewriting the prompt's last tokens after they were judged",
    "continuous_batching_config": "continuous batching, which does not pass through `generate`",
    "inputs_embeds": "a prompt without token ids, so its text-only view cannot be known",
    "decoder_input_ids": _OF_ENCODERS,
    "encoder_outputs": _OF_ENCODERS,
}


def check_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse an option that is not known to leave every token to the guarded model.

    The model's own inputs, images above all, are let through: what they show is taken out of the
    request before it is judged.

    Args:
        options: keyword arguments of `generate`.

    Raises:
        SafeguardError: and which it is.
    """
    config = vars(options.get("generation_config") or model.generation_config)
    known = vars(type(model.generation_config)()).keys() | REFUSED  # generate reads no others
    given = {name: config[name] for name in known if name in config} | options
    allowed = ALLOWED | model_inputs(model) | {*CACHE_NAMES}
    for name, value in given.items():
        if name in REFUSED:
            if _is_set(value):
                raise SafeguardError(
                    f"generate({name}=…) is {REFUSED[name]}, which the guard does not support. "
                    "Leave it out; nothing was generated."
                )
        elif name not in allowed and value is not None and not name.startswith("_"):
            raise SafeguardError(
                f"generate({name}=…) is not an option that is known to leave every token to the "
                "guarded model. Leave it out; nothing was generated."
            )


def setting(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """An option as `generate` takes it: from the call, from its config, or from the model's own."""
    sources = (options.get("generation_config"), model.generation_config)
    values = (options.get(name), *(getattr(source, name, None) for source in sources))
    return next((value for value in values if value is not None), None)


def model_inputs(model: PreTrainedModel) -> frozenset[str]:
    """Names of what a model's passes take."""
    names = {*signature(model.forward).parameters}
    names |= {*signature(type(model).prepare_inputs_for_generation).parameters}
    return frozenset(names)


def _is_set(value: Any) -> bool:
    """Whether an option of `REFUSED` does anything: factors of 1, and one group, do not."""
    if value is None or isinstance(value, bool):
        return bool(value)
    return not (isinstance(value, int | float) and value in (0, 1))
