"""What the family is: a standard LLaVA around a base LLM, with one tower and processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_safeguard.pocket.scenes import SIZE

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

PATCH = 16  # pixels; (64 / 16)² = 16 image tokens
IMAGE_TOKEN = "<image>"

#: ChatML. Images stand where the conversation puts them; no default system prompt is added.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def chat_template(system: str | None) -> str:
    """The template; a conversation without a system prompt gets `system`, where there is one."""
    if system is None:
        return CHAT_TEMPLATE
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}"
        "{%- endif -%}"
    ) + CHAT_TEMPLATE


def vision_config() -> Any:
    """The tower: 4 CLIP layers, 192 wide, 1.9 M parameters."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
    )


def make_processor(base: Path, system: str | None = None) -> LlavaProcessor:
    """The processor: the base's tokenizer plus one image token, and 64 × 64 images.

    Args:
        system: the system prompt of conversations that bring none.
    """
    from transformers import AddedToken, AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # some releases of transformers do not read it off a GGUF file
        tokenizer.pad_token = tokenizer.eos_token
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": SIZE, "width": SIZE},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=chat_template(system),
        image_token=IMAGE_TOKEN,
    )


def make_model(
    base: Path, image_token_id: int, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """The base LLM inside a LLaVA whose tower and projector are untrained."""
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    language_model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    size = image_token_id + 1
    if size > len(language_model.get_input_embeddings().weight):  # else the base has rows to spare
        language_model.resize_token_embeddings(size, mean_resizing=False)
    for table in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        table.weight.data[image_token_id] = 0

    config: LlavaConfig = LlavaConfig(
        vision_config=vision_config(),
        text_config=language_model.config,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    config.dtype = dtype
    with torch.device("meta"):  # the language model is there already; no second one is made
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = AutoModel.from_config(config.vision_config, dtype=dtype)
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(dtype)
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.generation_config = language_model.generation_config
    model.generation_config.pad_token_id = language_model.config.pad_token_id
    return model.eval()
