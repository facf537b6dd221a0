"""Readers of documents, and Molmo."""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2Processor,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingProcessor,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    HunYuanVLProcessor,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2Processor,
    PreTrainedModel,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrProcessor,
)
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import (
    DeepseekOcr2ImageProcessorPil,
)
from transformers.models.granite_docling.image_processing_pil_granite_docling import (
    GraniteDoclingImageProcessorPil,
)
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import (
    HunYuanVLImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tiny import make, make_tokenizer, tiny
from tiny.llava_kin import GRANITE
from tiny.others import (
    CHATML,
    PATCH,
    SIDE,
    UNSIZED,
    VISION,
    StandIn,
    decoder,
    grid,
    pixels,
    tiles,
)
from tiny.videos import PooledVideos, with_videos

SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 32,
    "window_size": 2,
    "global_attn_indexes": [1],
    "patch_size": 4,
    "downsample_channels": [8, 16],
}
OCR = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{ '<|User|>: ' }}"
    "{%- elif m['role'] == 'assistant' -%}{{ '<|Assistant|>: ' }}{%- endif -%}"
    "{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}{{ '<image>\\n' }}"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{{ '\\n\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|Assistant|>:{%- endif -%}"
)


def _experts(tokenizer: Any) -> dict[str, Any]:
    return decoder(
        tokenizer,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    )


@tiny("deepseek_ocr2")
def deepseek_ocr2() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(["<|User|>", "<|Assistant|>"], bos="<s>", image_token="<image>")
    processor = DeepseekOcr2Processor(
        DeepseekOcr2ImageProcessorPil(size={"height": 192, "width": 192}, tile_size=192),
        tokenizer,
        patch_size=4,
        downsample_ratio=4,
        chat_template=OCR,
    )
    processor.images_kwargs = {"crop_to_patches": True, "min_patches": 2, "max_patches": 2}
    config = DeepseekOcr2Config(
        experts_implementation="eager",
        vision_config={
            # the encoder takes 12 x 12 or 16 x 16 places, so windows keep it fast
            "sam_config": {**SAM, "image_size": 192, "global_attn_indexes": []},
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 8,
            },
        },
        text_config=_experts(tokenizer),
        image_token_id=tokenizer.image_token_id,
    )
    return make(DeepseekOcr2ForConditionalGeneration, config), processor


class UnlimitedStandIn(StandIn):
    def __init__(self) -> None:
        super().__init__()
        self.size = {"height": 64, "width": 64}
        self.tile_size = SIDE

    def outputs(self, images: list[Image]) -> dict[str, Any]:
        cut = [tiles(image, overview=False) if grid(image) != (1, 1) else [] for image in images]
        found = {
            "pixel_values": torch.stack([pixels(image, 64, 64) for image in images]),
            "num_local_patches": [len(pieces) for pieces in cut],
            "patches_grid": [list(grid(image)[::-1]) for image in images],
        }
        local = [piece for pieces in cut for piece in pieces]
        return {**found, "pixel_values_local": torch.stack(local)} if local else found


@tiny("unlimited_ocr")
def unlimited_ocr() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(["<|User|>", "<|Assistant|>"], bos="<s>", image_token="<image>")
    processor = UnlimitedOcrProcessor(
        UnlimitedStandIn(), tokenizer, patch_size=4, downsample_ratio=4, chat_template=OCR
    )
    config = UnlimitedOcrConfig(
        experts_implementation="eager",
        vision_config={
            "sam_config": {**SAM, "image_size": 64},
            "encoder_config": {**VISION, "image_size": 64, "patch_size": 16},
        },
        text_config={**_experts(tokenizer), "sliding_window": 16},
        image_token_id=tokenizer.image_token_id,
    )
    return make(UnlimitedOcrForConditionalGeneration, config), processor


MOLMO = CHATML.replace(
    "IMAGE{%- else", "<|image|>{%- elif c['type'] == 'video' -%}<|video|>{%- else"
)


class MolmoStandIn(StandIn):
    def outputs(self, images: list[Image]) -> dict[str, Any]:
        side = SIDE // PATCH
        pairs = torch.arange(side * side).view(side // 2, 2, side // 2, 2)
        pooling = pairs.transpose(1, 2).flatten(2).flatten(0, 1)  # 2 x 2 patches a token
        crops = torch.stack([pixels(image, SIDE, SIDE) for image in images for _ in range(2)])
        patches = crops.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        return {
            "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2),
            "image_token_pooling": torch.cat(
                [pooling + crop * side * side for crop in range(len(crops))]
            ),
            "image_grids": torch.tensor([[side // 2] * 4] * len(images)),
            "image_num_crops": torch.tensor([2] * len(images)),
        }


@tiny("molmo2")
def molmo2() -> tuple[PreTrainedModel, Any]:
    marks = [
        "<im_patch>",
        "<im_col>",
        "<im_start>",
        "<low_res_im_start>",
        "<frame_start>",
        "<im_end>",
        "<frame_end>",
        "<im_low>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    tokenizer = make_tokenizer(
        marks, eos="<|im_end|>", image_token="<|image|>", video_token="<|video|>"
    )
    processor = with_videos(Molmo2Processor)(
        MolmoStandIn(), PooledVideos(), tokenizer, chat_template=MOLMO
    )
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = Molmo2Config(
        vision_config={**VISION, **heads, "image_size": [SIDE, SIDE]},
        adapter_config={
            **heads,
            "vision_feature_layer": [1, 0],
            "hidden_size": 16,
            "intermediate_size": 32,
            "text_hidden_size": 32,
        },
        text_config=decoder(tokenizer, head_dim=8, additional_vocab_size=8),
        image_start_token_id=ids["<im_start>"],
        image_end_token_id=ids["<im_end>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_patch_id=ids["<im_patch>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
    )
    return make(Molmo2ForConditionalGeneration, config), processor


@tiny("lighton_ocr")
def lighton_ocr() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        eos="<|im_end|>",
        image_token="<|image_pad|>",
        image_break_token="<|vision_pad|>",
        image_end_token="<|vision_end|>",
    )
    processor = LightOnOcrProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, patch_size={"height": 2 * PATCH, "width": 2 * PATCH}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=CHATML.replace("IMAGE", "<|image_pad|>"),
    )
    config = LightOnOcrConfig(
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8, "image_size": 2 * SIDE},
        text_config={"model_type": "qwen3", **decoder(tokenizer, head_dim=8)},
        image_token_id=tokenizer.image_token_id,
        spatial_merge_size=2,
    )
    return make(LightOnOcrForConditionalGeneration, config), processor


HUNYUAN = (
    "<|hy_begin|>{%- for m in messages -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|hy_100|><|hy_102|><|hy_101|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}"
    "{{ {'system': '<|hy_3|>', 'user': '<|hy_User|>',"
    " 'assistant': '<|hy_Assistant|>'}[m['role']] }}"
    "{%- endfor -%}"
)


@tiny("hunyuan_vl")
def hunyuan_vl() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|hy_3|>", "<|hy_User|>", "<|hy_Assistant|>"],
        bos="<|hy_begin|>",
        eos="<|hy_Assistant|>",
        image_token="<|hy_102|>",
        image_start_token="<|hy_100|>",
        image_end_token="<|hy_101|>",
    )
    processor = HunYuanVLProcessor(
        image_processor=HunYuanVLImageProcessorPil(
            patch_size=PATCH, size={"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
        ),
        tokenizer=tokenizer,
        chat_template=HUNYUAN,
    )
    config = HunYuanVLConfig(
        vision_config={
            **UNSIZED,
            "out_hidden_size": 32,
            "max_image_size": 2 * SIDE,
            "min_image_size": SIDE,
            "img_max_token_num": 64,
        },
        text_config=decoder(
            tokenizer,
            head_dim=8,
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "alpha": 1000.0,
                "factor": 1.0,
                "mrope_section": [1, 1, 1, 1],
            },
        ),
        image_token_id=tokenizer.image_token_id,
        im_start_id=tokenizer.image_start_token_id,
        im_end_id=tokenizer.image_end_token_id,
    )
    return make(HunYuanVLForConditionalGeneration, config), processor


@tiny("granite_docling")
def granite_docling() -> tuple[PreTrainedModel, Any]:
    places = [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)]
    tokenizer = make_tokenizer(
        [
            "<|start_of_role|>",
            "<|end_of_role|>",
            "<fake_token_around_image>",
            "<global-img>",
            *places,
        ],
        eos="<|end_of_text|>",
        image_token="<image>",
    )
    processor = GraniteDoclingProcessor(
        GraniteDoclingImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=4),
        tokenizer,
        image_seq_len=4,
        chat_template=GRANITE.replace("<image>\n", "<image>"),
    )
    config = GraniteDoclingConfig(
        vision_config={
            **VISION,
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0],
        },
        text_config=decoder(
            tokenizer,
            embedding_multiplier=2.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
        ),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=0,
    )
    return make(GraniteDoclingForConditionalGeneration, config), processor
