"""Gemma and its relatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3nVisionConfig,
    Gemma3Processor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tiny import make, make_tokenizer, tiny
from tiny.videos import SoftTokenVideos, with_videos

SIDE, PATCH = 32, 8
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIDE,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GEMMA3 = (
    "{{ bos_token }}{%- set first = '' -%}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}{%- for m in messages -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n'"
    " + (first if loop.first else '') }}"
    "{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}<start_of_image>"
    "{%- elif c['type'] == 'audio' -%}<audio_soft_token>"
    "{%- else -%}{{ c['text'] | trim }}{%- endif -%}{%- endfor -%}{{ '<end_of_turn>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)


GEMMA4 = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}IMAGE"
    "{%- elif c['type'] == 'video' -%}<|video|>{%- elif c['type'] == 'audio' -%}<|audio|>"
    "{%- else -%}{{ c['text'] | trim }}{%- endif -%}{%- endfor -%}{{ '<turn|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}"
)


def gemma_tokenizer(start: str, end: str, **named: str) -> PreTrainedTokenizerFast:
    """With one token for every run of line breaks, as Gemma's has."""
    tokenizer = make_tokenizer([start, end], bos="<bos>", eos=end, **named)
    tokenizer.add_tokens(["\n" * count for count in range(1, 7)])
    return tokenizer


@tiny("gemma3")
def gemma3() -> tuple[PreTrainedModel, Any]:
    tokenizer = gemma_tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=GEMMA3,
    )
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config={**TEXT, "vocab_size": len(tokenizer), "query_pre_attn_scalar": 8},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return make(Gemma3ForConditionalGeneration, config), processor


class Convolution(PreTrainedModel):
    """Stands for the tower of Gemma 3n, convolutions of timm."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, PATCH, PATCH)
        self.post_init()

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


@tiny("gemma3n")
def gemma3n() -> tuple[PreTrainedModel, Any]:
    tokenizer = gemma_tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        audio_token="<audio_soft_token>",
        boa_token="<start_of_audio>",
        eoa_token="<end_of_audio>",
    )
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        image_seq_length=16,
        chat_template=GEMMA3.replace("start_of_image", "image_soft_token"),
    )
    words = len(tokenizer)
    AutoModel.register(Gemma3nVisionConfig, Convolution, exist_ok=True)
    config = Gemma3nConfig(
        vision_config={"hidden_size": 16, "vocab_size": 8, "vocab_offset": words},
        audio_config={
            "vocab_size": 8,
            "vocab_offset": words + 8,
            "hidden_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [4, 4],
        },
        text_config={
            **TEXT,
            "vocab_size": words + 16,
            "vocab_size_per_layer_input": words,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "num_kv_shared_layers": 2,
            "altup_num_inputs": 3,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        vision_soft_tokens_per_image=16,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_id=tokenizer.eoa_token_id,
    )
    return make(Gemma3nForConditionalGeneration, config), processor


@tiny("gemma4")
def gemma4() -> tuple[PreTrainedModel, Any]:
    tokenizer = gemma_tokenizer(
        "<|turn>",
        "<turn|>",
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    processor = with_videos(Gemma4Processor)(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70),
        tokenizer,
        SoftTokenVideos(),
        chat_template=GEMMA4.replace("IMAGE", "<|image|>"),
    )
    config = Gemma4Config(
        vision_config={
            **VISION,
            "patch_size": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 256,
        },
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
        },
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
    )
    return make(Gemma4ForConditionalGeneration, config), processor


@tiny("paligemma")
def paligemma(two: bool = True) -> tuple[PreTrainedModel, Any]:
    """PaliGemma 2, or the first one, whose language model has no sliding windows."""
    tokenizer = make_tokenizer([], bos="<bos>", image_token="<image>")
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(images, tokenizer)  # its checkpoints have no chat template
    text = {"model_type": "gemma2", **TEXT, "query_pre_attn_scalar": 8}
    if not two:
        windows = ("layer_types", "sliding_window")
        text = {name: value for name, value in TEXT.items() if name not in windows}
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config={**text, "vocab_size": len(tokenizer)},
        vocab_size=len(tokenizer),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return make(PaliGemmaForConditionalGeneration, config), processor
