"""Families that grew out of LLaVA: a vision tower, a projector and an ordinary decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    BatchFeature,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    ConvNextConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionProcessor,
    Granite4VisionTextConfig,
    HyperCLOVAXConfig,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    HyperCLOVAXVisionV2Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMProcessor,
    PreTrainedModel,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessor,
    Qwen2Config,
    Qwen3Config,
    SamVisionConfig,
    SiglipVisionConfig,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
    Step3p7Processor,
    Step3p7TextConfig,
    Step3p7VisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.qianfan_ocr.configuration_qianfan_ocr import QianfanOCRVisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny import make, make_tokenizer, tiny
from tiny.llava import CHAT, PATCH, SIDE, text, tower
from tiny.videos import PixelVideos, Videos, with_videos

TOKENS = (SIDE // PATCH) ** 2
SIZE = {"height": SIDE, "width": SIDE}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
#: A turn's images, then its videos, then all of its text, as the `llava-hf` checkpoints write it.
IMAGES_FIRST = (
    "{% macro shown(m) %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{% endmacro %}"
)
VICUNA = IMAGES_FIRST + (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ shown(m) }} "
    "{% elif m['role'] == 'user' %}USER: {{ shown(m) }} "
    "{% else %}ASSISTANT: {{ shown(m) }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VIP = IMAGES_FIRST + (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ shown(m) }}"
    "{% elif m['role'] == 'user' %}###Human: {{ shown(m) }}"
    "{% else %}###Assistant: {{ shown(m) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}###Assistant:{% endif %}"
)
ONEVISION = IMAGES_FIRST + (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ shown(m) }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COHERE = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m['role'] == 'user' %}<|USER_TOKEN|>"
    "{% elif m['role'] == 'system' %}<|SYSTEM_TOKEN|>"
    "{% else %}<|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)
COHERE_TURNS = [
    "<|START_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|END_OF_TURN_TOKEN|>",
]
#: DeepSeek-VL and Janus put a space between two texts, and Janus line breaks around images.
DEEPSEEK = (
    "{{ bos_token }}INTRO{% for m in messages %}"
    "{% if m['role'] == 'user' %}USER: {% elif m['role'] == 'assistant' %}ASSISTANT: "
    "{% else %}{{ m['role'] | capitalize }}: {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{% if not loop.first %}BREAK{% endif %}<image_placeholder>"
    "{% if not loop.last %}BREAK{% endif %}"
    "{% else %}{% if not loop.first and loop.previtem['type'] == 'text' %} {% endif %}"
    "{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'user' %}{{ '\n\n' }}{% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
INTRO = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\n"
)
DEEPSEEK_VL = DEEPSEEK.replace("INTRO", INTRO).replace("BREAK", "")
DEEPSEEK_VL = DEEPSEEK_VL.replace("USER", "User").replace("ASSISTANT", "Assistant")
JANUS = DEEPSEEK.replace("{{ bos_token }}INTRO", "").replace("BREAK", "{{ '\n' }}")
JANUS = JANUS.replace("USER", "<|User|>").replace("ASSISTANT", "<|Assistant|>")
INTERNVL = CHAT.replace("<image>", "<IMG_CONTEXT>").replace(
    "{% else %}{{ c", "{% elif c['type'] == 'video' %}<video>\n{% else %}{{ c"
)
THINK = "{% if add_generation_prompt %}<think>\n{% endif %}"
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
#: Images are numbered through the conversation.
HYPERCLOVAX = (
    "{% set ns = namespace(images=0, videos=0) %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    '<|mime_start|>{{ \'{"id": "image_%02d", "type": "image/jpeg"}\' % ns.images }}<|mime_end|>\n'
    "<|image_start|><|image_pad|><|image_end|>\n{% set ns.images = ns.images + 1 %}"
    "{% elif c['type'] == 'video' %}"
    '<|mime_start|>{{ \'{"id": "video_%02d", "type": "video/mp4"}\' % ns.videos }}<|mime_end|>\n'
    '<|video_aux_start|>{"video_duration": <|video_duration|>}<|video_aux_end|>\n'
    "<|video_start|><|video_pad|><|video_end|>\n{% set ns.videos = ns.videos + 1 %}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
PERCEPTION = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>"
    "{% elif c['type'] == 'video' %}<|video|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ASSISTANT = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)


def siglip(patch: int = PATCH, **options: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=patch,
        **options,
    )


class Step3p7Images(GotOcr2ImageProcessorPil):
    """A view of the whole image and its tiles apart; the family's own class needs torchvision."""

    patch_size = SIDE
    vision_patch_size = PATCH // 4
    downsampler_stride = 4

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        found = super().preprocess(images, **options)
        counts = [int(count) - 1 for count in found["num_patches"]]
        views = found["pixel_values"].split([count + 1 for count in counts])
        return BatchFeature(
            {
                "pixel_values": torch.stack([view[-1] for view in views]),
                "pixel_values_local": torch.cat([view[:-1] for view in views]),
                "num_local_patches": torch.tensor(counts),
                "patch_newline_masks": [
                    [2 * i + 2 == count for i in range(count)] for count in counts
                ],
            }
        )


class PerceptionImages(GotOcr2ImageProcessorPil):
    """Four tiles and a view of the whole; the family's own class needs torchvision."""

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        found = super().preprocess(images, **options)
        return BatchFeature({"pixel_values": found["pixel_values"].unflatten(0, (-1, 5))})


@tiny("vipllava")
def vipllava() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(["<image>"], bos="<s>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=SIZE, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=VIP,
        image_token="<image>",
    )
    config = VipLlavaConfig(
        vision_config=tower(),
        text_config=text(len(tokenizer)),
        vision_feature_layer=[-2, -1],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
    )
    return make(VipLlavaForConditionalGeneration, config), processor


@tiny("llava_onevision")
def llava_onevision() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos="<|im_end|>"
    )
    processor = with_videos(LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessorPil(size=SIZE, image_grid_pinpoints=GRID),
        tokenizer=tokenizer,
        video_processor=PixelVideos(),
        num_image_tokens=TOKENS,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )
    config = LlavaOnevisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=Qwen2Config(vocab_size=len(tokenizer), **SMALL),
        image_grid_pinpoints=GRID,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    return make(LlavaOnevisionForConditionalGeneration, config), processor


@tiny("llava_next_video")
def llava_next_video() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(["<image>", "<video>"], bos="<s>")
    processor = with_videos(LlavaNextVideoProcessor)(
        video_processor=PixelVideos(),
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=SIZE, image_grid_pinpoints=GRID
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=VICUNA,
    )
    config = LlavaNextVideoConfig(
        vision_config=tower(),
        text_config=text(len(tokenizer)),
        image_grid_pinpoints=GRID,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_seq_length=TOKENS,
    )
    return make(LlavaNextVideoForConditionalGeneration, config), processor


@tiny("video_llava")
def video_llava() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(["<image>", "<video>"], bos="<s>")
    processor = with_videos(VideoLlavaProcessor)(
        image_processor=VideoLlavaImageProcessor(size=SIZE, crop_size=SIZE),
        video_processor=PixelVideos(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=VICUNA,
        num_additional_image_tokens=1,
    )
    config = VideoLlavaConfig(
        vision_config=tower(),
        text_config=text(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_seq_length=TOKENS,
    )
    return make(VideoLlavaForConditionalGeneration, config), processor


def tiles() -> GotOcr2ImageProcessorPil:
    """An image and, where it is large, up to four tiles of it."""
    return GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)


@tiny("internvl")
def internvl() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        eos="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = with_videos(InternVLProcessor)(
        tiles(),
        tokenizer,
        PixelVideos(),
        image_seq_length=TOKENS,
        chat_template=INTERNVL,
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH // 2,
        ),
        text_config=Qwen2Config(vocab_size=len(tokenizer), **SMALL),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS,
    )
    return make(InternVLForConditionalGeneration, config), processor


def cohere_text(vocabulary: int) -> Cohere2Config:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    return Cohere2Config(
        vocab_size=vocabulary,
        **SMALL,
        sliding_window=16,
        layer_types=kinds,
        bos_token_id=1,
        eos_token_id=2,
    )


@tiny("aya_vision")
def aya_vision() -> tuple[PreTrainedModel, Any]:
    images = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tokenizer = make_tokenizer(
        [*COHERE_TURNS, "<image>", *images, "TILE_GLOBAL"],
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    )
    processor = AyaVisionProcessor(
        tiles(),
        tokenizer,
        patch_size=PATCH // 2,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=COHERE.replace("IMAGE", "<image>"),
    )
    config = AyaVisionConfig(
        vision_config=siglip(PATCH // 2, vision_use_head=False),
        text_config=cohere_text(len(tokenizer)),
        downsample_factor=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return make(AyaVisionForConditionalGeneration, config), processor


@tiny("cohere2_vision")
def cohere2_vision() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        COHERE_TURNS,
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    images = tiles()  # the family's own, which tiles much the same, needs torchvision
    images.patch_size = SIDE // PATCH
    processor = Cohere2VisionProcessor(
        images, tokenizer, chat_template=COHERE.replace("IMAGE", "<|IMG_PATCH|>")
    )
    config = Cohere2VisionConfig(
        vision_config=siglip(PATCH // 2),
        text_config=cohere_text(len(tokenizer)),
        downsample_factor=2,
        alignment_intermediate_size=64,
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return make(Cohere2VisionForConditionalGeneration, config), processor


@tiny("deepseek_vl")
def deepseek_vl() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer([], bos="<s>", image_token="<image_placeholder>")
    processor = DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size=SIZE),
        tokenizer,
        chat_template=DEEPSEEK_VL,
        num_image_tokens=TOKENS,
    )
    config = DeepseekVLConfig(
        vision_config=siglip(),
        text_config=text(len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return make(DeepseekVLForConditionalGeneration, config), processor


@tiny("deepseek_vl_hybrid")
def deepseek_vl_hybrid() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer([], bos="<s>", image_token="<image_placeholder>")
    high = {"height": 2 * SIDE, "width": 2 * SIDE}
    processor = DeepseekVLHybridProcessor(
        DeepseekVLHybridImageProcessorPil(size=SIZE, high_res_size=high),
        tokenizer,
        chat_template=DEEPSEEK_VL,
        num_image_tokens=TOKENS,
    )
    config = DeepseekVLHybridConfig(
        vision_config=siglip(),
        text_config=text(len(tokenizer)),
        high_res_vision_config=SamVisionConfig(
            hidden_size=16,
            output_channels=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=2 * SIDE,
            patch_size=PATCH,
            window_size=2,
            global_attn_indexes=[1],
            mlp_dim=32,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return make(DeepseekVLHybridForConditionalGeneration, config), processor


@tiny("janus")
def janus() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|User|>", "<|Assistant|>"],
        bos="<s>",
        image_token="<image_placeholder>",
        boi_token="<begin_of_image>",
        eoi_token="<end_of_image>",
    )
    processor = JanusProcessor(
        JanusImageProcessorPil(size=SIZE),
        tokenizer,
        chat_template=JANUS,
        use_default_system_prompt=True,
        num_image_tokens=TOKENS,
    )
    config = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=32,
            num_image_tokens=TOKENS,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=16,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        text_config=text(len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return make(JanusForConditionalGeneration, config), processor


@tiny("ovis2")
def ovis2() -> tuple[PreTrainedModel, Any]:
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<image>", "<IMG_ATOM>", *marks], eos="<|im_end|>"
    )
    processor = Ovis2Processor(
        Ovis2ImageProcessorPil(size=SIZE, crop_to_patches=True, max_patches=4),
        tokenizer,
        chat_template="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHAT,
        image_seq_length=TOKENS,
    )
    config = Ovis2Config(
        vision_config=Ovis2VisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH // 2,
            vocab_size=32,
            hidden_stride=2,
        ),
        text_config=Qwen2Config(vocab_size=len(tokenizer), **SMALL),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
        vocab_size=len(tokenizer),
        hidden_size=32,
    )
    return make(Ovis2ForConditionalGeneration, config), processor


@tiny("qianfan_ocr")
def qianfan_ocr() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<image>"],
        eos="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
    )
    processor = QianfanOCRProcessor(tiles(), tokenizer, image_seq_length=TOKENS, chat_template=CHAT)
    config = QianfanOCRConfig(
        vision_config=QianfanOCRVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH // 2,
        ),
        text_config=Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **SMALL),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS,
    )
    return make(QianfanOCRForConditionalGeneration, config), processor


@tiny("step3p7")
def step3p7() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        [
            "<|im_start|>",
            "<|im_end|>",
            "<think>",
            "</think>",
            "<im_start>",
            "<im_patch>",
            "<im_end>",
            "<patch_start>",
            "<patch_end>",
            "<patch_newline>",
        ],
        eos="<|im_end|>",
    )
    images = Step3p7Images(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = Step3p7Processor(
        images, tokenizer, chat_template=CHAT.replace("<image>\n", "<im_patch>") + THINK
    )
    config = Step3p7Config(
        vision_config=Step3p7VisionConfig(
            hidden_size=16,
            mlp_ratio=2.0,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH // 4,
            max_position_embeddings=64,
        ),
        text_config=Step3p7TextConfig(
            **SMALL,
            vocab_size=len(tokenizer),
            head_dim=8,
            num_experts_per_tok=2,
            n_routed_experts=4,
            moe_intermediate_size=16,
            share_expert_dim=16,
            sliding_window=16,
            num_sliding_attention_heads=8,
            layer_types=["full_attention"] + ["sliding_attention"] * 3,
            mlp_layer_types=["dense", "dense", "sparse", "sparse"],
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
    )
    return make(Step3p7ForConditionalGeneration, config), processor


@tiny("granite4_vision")
def granite4_vision() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|start_of_role|>", "<|end_of_role|>", "<image>"], eos="<|end_of_text|>"
    )
    processor = Granite4VisionProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=SIZE, image_grid_pinpoints=GRID
        ),
        tokenizer,
        patch_size=PATCH // 2,
        vision_feature_select_strategy="full",
        chat_template=GRANITE,
        downsample_rate="1/2",
    )
    small = {**SMALL, "num_hidden_layers": 6}  # five layers take features of the image
    config = Granite4VisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH // 2,
            vision_use_head=False,
        ),
        text_config=Granite4VisionTextConfig(
            vocab_size=len(tokenizer),
            **small,
            embedding_multiplier=2.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
        ),
        qformer_config={"num_hidden_layers": 1, "intermediate_size": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        image_grid_pinpoints=GRID,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1, 2, 3, 4],
    )
    return make(Granite4VisionForConditionalGeneration, config), processor


@tiny("hyperclovax_vision_v2")
def hyperclovax_vision_v2() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        [
            "<|im_start|>",
            "<|im_end|>",
            "<|image_start|>",
            "<|image_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<|video_start|>",
            "<|video_end|>",
            "<|video_aux_start|>",
            "<|video_aux_end|>",
            "<|mime_start|>",
            "<|mime_end|>",
            "<think>",
            "</think>",
        ],
        eos="<|im_end|>",
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH // 4,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=256,
        max_pixels=1024,
    )
    processor = with_videos(HyperCLOVAXVisionV2Processor)(
        images, tokenizer, Videos(), chat_template=HYPERCLOVAX
    )
    config = HyperCLOVAXVisionV2Config(
        vision_config=Qwen2_5_VLVisionConfig(
            depth=2,
            hidden_size=16,
            out_hidden_size=32,
            num_heads=2,
            intermediate_size=32,
            patch_size=PATCH // 4,
            window_size=PATCH,
            fullatt_block_indexes=[1],
        ),
        text_config=HyperCLOVAXConfig(vocab_size=len(tokenizer), **SMALL, logits_scaling=0.5),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return make(HyperCLOVAXVisionV2ForConditionalGeneration, config), processor


@tiny("perception_lm")
def perception_lm() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        image_token="<|image|>",
        video_token="<|video|>",
    )
    images = PerceptionImages(size=SIZE, crop_to_patches=True, min_patches=4, max_patches=4)
    processor = with_videos(PerceptionLMProcessor)(
        PixelVideos(),
        images,
        tokenizer,
        patch_size=PATCH // 2,
        chat_template=PERCEPTION,
        pooling_ratio=2,
    )
    config = PerceptionLMConfig(
        vision_config=siglip(PATCH // 2, vision_use_head=False, model_args={"embed_dim": 16}),
        text_config=text(len(tokenizer)),
        vision_use_cls_token=False,
        projector_pooling_ratio=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )
    return make(PerceptionLMForConditionalGeneration, config), processor


@tiny("fast_vlm")
def fast_vlm() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>", "<image>"], eos="<|im_end|>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=SIZE, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=ASSISTANT + CHAT,
        image_token="<image>",
    )
    config = FastVlmConfig(
        vision_config=ConvNextConfig(  # convolutions, as the family's own tower, which needs timm
            hidden_size=16,
            num_stages=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            patch_size=PATCH // 2,
            image_size=SIDE,
        ),
        text_config=Qwen2Config(vocab_size=len(tokenizer), **SMALL),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
    )
    return make(FastVlmForConditionalGeneration, config), processor
