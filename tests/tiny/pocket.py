"""A random LLaVA in the shape of the Pocket VLM, on which most tests run."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tiny import train_tokenizer
from vlm_safeguard.pocket.architecture import CHAT_TEMPLATE

IMAGE_SIDE, PATCH = 32, 16  # 4 image tokens
LAYERS, WIDTH = 6, 32


def make_processor(chat_template: str = CHAT_TEMPLATE) -> LlavaProcessor:
    """A LLaVA processor whose tokenizer is trained here, on the shipped anchors."""
    special = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(special, 507),
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}, do_center_crop=False
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
    )


def make_model(
    processor: LlavaProcessor, *, seed: int = 0, layers: int = LAYERS, width: int = WIDTH
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,  # as many as the decoder: counting alone must not do
            num_attention_heads=2,
            image_size=IMAGE_SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            pad_token_id=processor.tokenizer.pad_token_id,
            bos_token_id=processor.tokenizer.bos_token_id,
            eos_token_id=None,
        ),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIDE // PATCH) ** 2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    return model
