"""Qwen-VL and the families that follow it: 3-D rotary positions, patches in a grid."""

from __future__ import annotations

from typing import Any

from transformers import (
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3EdgeProcessor,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeProcessor,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Exaone4_5_Processor,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    Glm5NextProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VProcessor,
    GlmgaConfig,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Processor,
    WhisperFeatureExtractor,
)
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import (
    Cosmos3EdgeImageProcessorPil,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.glmga.image_processing_pil_glmga import GlmgaImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
    PaddleOCRVLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import (
    VideoLlama3ImageProcessorPil,
)

from tiny import make, make_tokenizer, tiny
from tiny.videos import CompressedVideos, Videos, with_videos

PATCH = 4
PIXELS = {"min_pixels": 16 * 16, "max_pixels": 32 * 32}

TURNS = (
    "{%- set n = namespace(images=0, videos=0) -%}{%- for m in messages -%}"
    "{%- if DEFAULT and loop.first and m['role'] != 'system' -%}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif -%}"
    "<|im_start|>{{ m['role'] }}\n{% for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}{%- set n.images = n.images + 1 -%}"
    "{%- if add_vision_id -%}Picture {{ n.images }}: {% endif -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif c['type'] == 'video' -%}{%- set n.videos = n.videos + 1 -%}"
    "{%- if add_vision_id -%}Video {{ n.videos }}: {% endif -%}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\nTHINK{%- endif -%}"
)
#: Qwen2-VL has a system prompt of its own, Qwen3-VL none, Qwen3.5 starts to think.
CHAT_2 = TURNS.replace("DEFAULT", "true").replace("THINK", "")
CHAT_3 = TURNS.replace("DEFAULT", "false").replace("THINK", "")
CHAT_THINK = TURNS.replace("DEFAULT", "false").replace("THINK", "<think>\n")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(
        [
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<think>",
            "</think>",
        ],
        eos="<|im_end|>",
    )


def qwen_images() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(patch_size=PATCH, temporal_patch_size=2, merge_size=2, **PIXELS)


def qwen_processor(
    processor_class: type[ProcessorMixin], tokenizer: PreTrainedTokenizerFast, chat: str
) -> Any:
    return with_videos(processor_class)(qwen_images(), tokenizer, Videos(), chat_template=chat)


def qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }


def text(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """A text config; heads of 8, half of them split over time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": rope,
        **more,
    }


def tower(**more: Any) -> dict[str, Any]:
    return {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH, **more}


@tiny("qwen2_vl")
def qwen2_vl() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen2VLProcessor, tokenizer, CHAT_2)
    config = Qwen2VLConfig(
        text_config=text(tokenizer),
        vision_config=tower(embed_dim=16, mlp_ratio=2),
        **qwen_ids(tokenizer),
    )
    return make(Qwen2VLForConditionalGeneration, config), processor


@tiny("qwen2_5_vl")
def qwen2_5_vl() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen2_5_VLProcessor, tokenizer, CHAT_2)
    vision = tower(
        intermediate_size=32, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]
    )
    config = Qwen2_5_VLConfig(
        text_config=text(tokenizer), vision_config=vision, **qwen_ids(tokenizer)
    )
    return make(Qwen2_5_VLForConditionalGeneration, config), processor


def deep_tower(**more: Any) -> dict[str, Any]:
    return tower(intermediate_size=32, out_hidden_size=32, num_position_embeddings=64, **more)


@tiny("qwen3_vl")
def qwen3_vl() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, CHAT_3)
    config = Qwen3VLConfig(
        text_config=text(tokenizer, head_dim=8),
        vision_config=deep_tower(deepstack_visual_indexes=[0]),
        **qwen_ids(tokenizer),
    )
    return make(Qwen3VLForConditionalGeneration, config), processor


@tiny("qwen3_vl_moe")
def qwen3_vl_moe() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, CHAT_3)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3VLMoeConfig(
        experts_implementation="eager",
        text_config=text(tokenizer, head_dim=8, mlp_only_layers=[1], **experts),
        vision_config=deep_tower(deepstack_visual_indexes=[0]),
        **qwen_ids(tokenizer),
    )
    return make(Qwen3VLMoeForConditionalGeneration, config), processor


def linear(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """A text config that mixes linear attention with full attention."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    return text(
        tokenizer,
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters=rope,
        layer_types=["linear_attention", "full_attention"] * 2,
        **more,
    )


@tiny("qwen3_5")
def qwen3_5() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, CHAT_THINK)
    config = Qwen3_5Config(
        text_config=linear(tokenizer), vision_config=deep_tower(), **qwen_ids(tokenizer)
    )
    return make(Qwen3_5ForConditionalGeneration, config), processor


@tiny("qwen3_5_moe")
def qwen3_5_moe() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, CHAT_THINK)
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    config = Qwen3_5MoeConfig(
        experts_implementation="eager",
        text_config=linear(tokenizer, **experts),
        vision_config=deep_tower(),
        **qwen_ids(tokenizer),
    )
    return make(Qwen3_5MoeForConditionalGeneration, config), processor


GLM_CHAT = (
    "[gMASK]<sop>{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' %}<|assistant|>\n<think></think>\n"
    "{%- else %}<|{{ m['role'] }}|>\n{%- endif %}"
    "{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{%- elif c['type'] == 'video' %}<|begin_of_video|><|video|><|end_of_video|>"
    "{%- else %}{{ c['text'] }}{%- endif %}{%- endfor %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>\n<think>{%- endif %}"
)


def glm_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(
        [
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<think>",
            "</think>",
            "<|begin_of_image|>",
            "<|image|>",
            "<|end_of_image|>",
            "<|begin_of_video|>",
            "<|video|>",
            "<|end_of_video|>",
        ],
        eos="<|endoftext|>",
    )


def glm_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image|>"),
            ("video", "<|video|>"),
            ("image_start", "<|begin_of_image|>"),
            ("image_end", "<|end_of_image|>"),
            ("video_start", "<|begin_of_video|>"),
            ("video_end", "<|end_of_video|>"),
        )
    }


def glm_text(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """A text config; half of each head of 16 rotates."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return text(tokenizer, rope_parameters=rope, **heads, **more)


def glm_tower() -> dict[str, Any]:
    return tower(intermediate_size=32, out_hidden_size=32, image_size=32)


def glm_processor(processor: type[ProcessorMixin], images: type[Any], tokenizer: Any) -> Any:
    size = {"shortest_edge": 16 * 16 * 2, "longest_edge": 32 * 32 * 2}  # two frames an image
    return with_videos(processor)(
        images(patch_size=PATCH, size=size), tokenizer, Videos(), chat_template=GLM_CHAT
    )


@tiny("glm4v")
def glm4v() -> tuple[PreTrainedModel, Any]:
    tokenizer = glm_tokenizer()
    config = Glm4vConfig(
        text_config=glm_text(tokenizer), vision_config=glm_tower(), **glm_ids(tokenizer)
    )
    processor = glm_processor(Glm4vProcessor, Glm4vImageProcessorPil, tokenizer)
    return make(Glm4vForConditionalGeneration, config), processor


def _glm46v(config_class: type[Any], images: type[Any]) -> tuple[PreTrainedModel, Any]:
    """GLM-4.6V, or the one that differs from it in how images are cut only."""
    tokenizer = glm_tokenizer()
    config = config_class(
        text_config={"model_type": "glm4v_text", **glm_text(tokenizer)},
        vision_config={"model_type": "glm4v_vision", **glm_tower()},
        **glm_ids(tokenizer),
    )
    processor = glm_processor(Glm46VProcessor, images, tokenizer)
    return make(Glm46VForConditionalGeneration, config), processor


@tiny("glm46v")
def glm46v() -> tuple[PreTrainedModel, Any]:
    return _glm46v(Glm46VConfig, Glm46VImageProcessorPil)


@tiny("glmga")
def glmga() -> tuple[PreTrainedModel, Any]:
    return _glm46v(GlmgaConfig, GlmgaImageProcessorPil)


@tiny("glm4v_moe")
def glm4v_moe() -> tuple[PreTrainedModel, Any]:
    tokenizer = glm_tokenizer()
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Glm4vMoeConfig(
        text_config=glm_text(tokenizer, **experts),
        vision_config=glm_tower(),
        experts_implementation="eager",
        **glm_ids(tokenizer),
    )
    processor = glm_processor(Glm4vProcessor, Glm4vImageProcessorPil, tokenizer)
    return make(Glm4vMoeForConditionalGeneration, config), processor


@tiny("glm_ocr")
def glm_ocr() -> tuple[PreTrainedModel, Any]:
    tokenizer = glm_tokenizer()
    config = GlmOcrConfig(
        text_config=glm_text(tokenizer), vision_config=glm_tower(), **glm_ids(tokenizer)
    )
    processor = glm_processor(Glm46VProcessor, Glm46VImageProcessorPil, tokenizer)
    return make(GlmOcrForConditionalGeneration, config), processor


@tiny("glm5_next")
def glm5_next() -> tuple[PreTrainedModel, Any]:
    tokenizer = glm_tokenizer()
    config = Glm5NextConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "hc_mult": 3,
            "index_topk": 64,
            "index_kpool": 2,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=tower(
            intermediate_size=32, out_hidden_size=32, image_size=32, projection_intermediate_size=32
        ),
        experts_implementation="eager",
        **glm_ids(tokenizer),
    )
    images = Glm5NextImageProcessorPil(patch_size=PATCH, min_image_tokens=4, max_image_tokens=16)
    processor = with_videos(Glm5NextProcessor)(images, tokenizer, Videos(), chat_template=GLM_CHAT)
    return make(Glm5NextForConditionalGeneration, config), processor


ERNIE_TOKENS = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
ERNIE_CHAT = (
    "{%- set n = namespace(images=0, videos=0) -%}<|begin_of_sentence|>"
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' %}\nAssistant: "
    "{%- elif m['role'] == 'user' %}User: {%- endif %}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' %}{%- set n.images = n.images + 1 -%}"
    "Picture {{ n.images }}:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    "{%- elif c['type'] == 'video' %}{%- set n.videos = n.videos + 1 -%}"
    "Video {{ n.videos }}:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
    "{%- else %}{{ c['text'] }}{%- endif %}{%- endfor %}"
    "{%- if m['role'] == 'system' %}\n{%- elif m['role'] == 'assistant' %}<|end_of_sentence|>"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}\nAssistant: <think>\n{%- endif %}"
)


@tiny("ernie4_5_vl_moe")
def ernie4_5_vl_moe() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<think>", "</think>"],
        bos="<|begin_of_sentence|>",
        eos="<|end_of_sentence|>",
        **ERNIE_TOKENS,
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    images = Ernie4_5_VLMoeImageProcessorPil(patch_size=PATCH, size=size)
    processor = with_videos(Ernie4_5_VLMoeProcessor)(
        images, tokenizer, Videos(), chat_template=ERNIE_CHAT
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    experts = {
        "moe_intermediate_size": [16, 8],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
    }
    config = Ernie4_5_VLMoeConfig(
        text_config=text(tokenizer, rope_parameters=rope, **experts),
        vision_config=tower(intermediate_size=32),
        experts_implementation="eager",
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(x) for name, x in ERNIE_TOKENS.items()},
    )
    return make(Ernie4_5_VLMoeForConditionalGeneration, config), processor


VIDEO_LLAMA_CHAT = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|image_pad|>\n"
    "{% elif c['type'] == 'video' -%}<|video_pad|>\n{% else -%}{{ c['text'] }}{%- endif -%}"
    "{%- endfor -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)


@tiny("video_llama_3")
def video_llama_3() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    images = VideoLlama3ImageProcessorPil(patch_size=PATCH, **PIXELS)
    processor = with_videos(VideoLlama3Processor)(
        images, tokenizer, CompressedVideos(), chat_template=VIDEO_LLAMA_CHAT
    )
    ids = qwen_ids(tokenizer)
    plain = text(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = VideoLlama3Config(
        text_config={"model_type": "qwen2", **plain},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
        },
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
    )
    return make(VideoLlama3ForConditionalGeneration, config), processor


PADDLE_CHAT = (
    "<|begin_of_sentence|>{%- for m in messages -%}"
    "{%- if m['role'] == 'user' %}User: {%- elif m['role'] == 'assistant' %}Assistant:\n"
    "{%- endif %}{%- for c in m['content'] if c['type'] == 'image' -%}"
    "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{%- endfor %}"
    "{%- for c in m['content'] if c['type'] == 'text' -%}{{ c['text'] }}{%- endfor %}"
    "{%- if m['role'] == 'assistant' %}</s>{%- else %}\n{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}Assistant:\n{%- endif %}"
)


@tiny("paddleocr_vl")
def paddleocr_vl() -> tuple[PreTrainedModel, Any]:
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
    tokenizer = make_tokenizer(
        ["<|IMAGE_START|>", "<|IMAGE_END|>"], bos="<|begin_of_sentence|>", **names
    )
    images = PaddleOCRVLImageProcessorPil(patch_size=PATCH, **PIXELS)
    processor = PaddleOCRVLProcessor(images, tokenizer, chat_template=PADDLE_CHAT)
    config = PaddleOCRVLConfig(
        text_config=text(tokenizer, head_dim=8),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "image_size": 32,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_PLACEHOLDER|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|VIDEO_PLACEHOLDER|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_START|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_END|>"),
    )
    return make(PaddleOCRVLForConditionalGeneration, config), processor


EXAONE_CHAT = (
    "{%- for m in messages -%}[|{{ m['role'] }}|]\n{% for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<vision><|image_pad|></vision>\n"
    "{% elif c['type'] == 'video' -%}<vision><|video_pad|></vision>\n"
    "{% else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}[|endofturn|]\n{% endfor -%}"
    "{%- if add_generation_prompt -%}[|assistant|]\n<think>\n{% endif -%}"
)


@tiny("exaone4_5")
def exaone4_5() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        [
            "[|system|]",
            "[|user|]",
            "[|assistant|]",
            "<vision>",
            "</vision>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<think>",
            "</think>",
        ],
        eos="[|endofturn|]",
    )
    processor = with_videos(Exaone4_5_Processor)(
        qwen_images(), tokenizer, Videos(), chat_template=EXAONE_CHAT
    )
    plain = text(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    config = Exaone4_5_Config(
        text_config={"model_type": "exaone4", **plain, **mixed},
        vision_config=tower(
            intermediate_size=32,
            out_hidden_size=32,
            window_size=16,
            fullatt_block_indexes=[1],
            num_key_value_heads=1,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return make(Exaone4_5_ForConditionalGeneration, config), processor


@tiny("cosmos3_edge")
def cosmos3_edge() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    images = Cosmos3EdgeImageProcessorPil(patch_size=PATCH, size=size)
    processor = with_videos(Cosmos3EdgeProcessor)(
        images, tokenizer, Videos(temporal_patch_size=1), chat_template=CHAT_3
    )
    processor.return_mm_token_type_ids = True  # off by default, though the model demands them
    config = Cosmos3EdgeConfig(
        text_config=text(tokenizer, head_dim=8),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 64,
        },
        projector_hidden_size=32,
        **qwen_ids(tokenizer),
    )
    return make(Cosmos3EdgeForConditionalGeneration, config), processor


@tiny("cosmos3_omni")
def cosmos3_omni() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, CHAT_3)
    config = Cosmos3OmniConfig(
        text_config={"model_type": "qwen3_vl_text", **text(tokenizer, head_dim=8)},
        vision_config={"model_type": "qwen3_vl_vision", **deep_tower(deepstack_visual_indexes=[0])},
        **qwen_ids(tokenizer),
    )
    return make(Cosmos3OmniForConditionalGeneration, config), processor


#: The same with audio, for the families that hear.
AUDIO = "{%- elif c['type'] == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>{%- else -%}{{ c"
OMNI_2, OMNI_3 = (chat.replace("{%- else -%}{{ c", AUDIO) for chat in (CHAT_2, CHAT_3))
OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
OMNI_3_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def omni_tokenizer(tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    return make_tokenizer(["<|im_start|>", "<|im_end|>"], eos="<|im_end|>", **tokens)


def ear(**more: Any) -> dict[str, Any]:
    """An audio encoder, which no request here uses."""
    return {
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        "output_dim": 32,
        **more,
    }


@tiny("qwen2_5_omni_thinker")
def qwen2_5_omni_thinker() -> tuple[PreTrainedModel, Any]:
    tokenizer = omni_tokenizer(OMNI_TOKENS)
    chat = OMNI_2
    for kind in ("vision", "audio"):
        chat = chat.replace(f"<|{kind}_start|>", f"<|{kind}_bos|>")
        chat = chat.replace(f"<|{kind}_end|>", f"<|{kind}_eos|>")
    for kind in ("image", "video", "audio"):
        chat = chat.replace(f"{kind}_pad", kind.upper())
    processor = with_videos(Qwen2_5OmniProcessor)(
        image_processor=qwen_images(),
        tokenizer=tokenizer,
        video_processor=Videos(),
        feature_extractor=WhisperFeatureExtractor(feature_size=16),
        chat_template=chat,
    )
    config = Qwen2_5OmniThinkerConfig(
        text_config=text(tokenizer),
        audio_config=ear(),
        vision_config=tower(
            intermediate_size=32, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMAGE|>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<|VIDEO|>"),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        audio_start_token_id=tokenizer.convert_tokens_to_ids("<|audio_bos|>"),
        audio_end_token_id=tokenizer.convert_tokens_to_ids("<|audio_eos|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_bos|>"),
    )
    return make(Qwen2_5OmniThinkerForConditionalGeneration, config), processor


@tiny("qwen3_omni_moe_thinker")
def qwen3_omni_moe_thinker() -> tuple[PreTrainedModel, Any]:
    tokenizer = omni_tokenizer(OMNI_3_TOKENS)
    processor = with_videos(Qwen3OmniMoeProcessor)(
        image_processor=qwen_images(),
        tokenizer=tokenizer,
        video_processor=Videos(),
        feature_extractor=WhisperFeatureExtractor(feature_size=16),
        chat_template=OMNI_3,
    )
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3OmniMoeThinkerConfig(
        text_config=text(tokenizer, head_dim=8, **experts),
        audio_config=ear(downsample_hidden_size=8),
        vision_config=deep_tower(deepstack_visual_indexes=[0]),
        experts_implementation="eager",
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
        audio_start_token_id=tokenizer.convert_tokens_to_ids("<|audio_start|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )
    return make(Qwen3OmniMoeThinkerForConditionalGeneration, config), processor


@tiny("qwen4_exp")
def qwen4_exp() -> tuple[PreTrainedModel, Any]:
    tokenizer = qwen_tokenizer()
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, CHAT_THINK)
    more = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "hc_count": 2,
        "hc_lowrank": 8,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    }
    config = Qwen4ExpConfig(
        text_config={**linear(tokenizer), **more},
        vision_config=deep_tower(),
        experts_implementation="eager",
        **qwen_ids(tokenizer),
    )
    return make(Qwen4ExpForConditionalGeneration, config), processor
