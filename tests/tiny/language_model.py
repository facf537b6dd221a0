"""A LLaMA that reads text alone, and its tokenizer: for judges and perplexity, not a family."""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny import make, make_tokenizer


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """Puts `<s>` before a text unless told not to, as Llama's."""
    tokenizer = make_tokenizer(["<image>"], bos="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer


def language_model(tokenizer: PreTrainedTokenizerFast, **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        **options,
    )
    model = make(LlamaForCausalLM, config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
