"""The newest families, most of whose chat templates are taken from a relative."""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    CohereCompassProcessor,
    Dots3NoteConfig,
    Dots3NoteFeatureExtractor,
    Dots3NoteForConditionalGeneration,
    Dots3NoteProcessor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedProcessor,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    MuseGlimmerProcessor,
    MuseSparkConfig,
    MuseSparkFeatureExtractor,
    MuseSparkForConditionalGeneration,
    MuseSparkProcessor,
    PreTrainedModel,
)
from transformers.models.cohere_compass.image_processing_pil_cohere_compass import (
    CohereCompassImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny import make, make_tokenizer, tiny
from tiny.gemma import GEMMA4, TEXT, gemma_tokenizer
from tiny.llava_kin import COHERE, COHERE_TURNS
from tiny.others import PATCH, SIDE, UNSIZED, StandIn, decoder, grid, pixels
from tiny.videos import SoftTokenVideos, Videos, with_videos

COHERE_VIDEO = COHERE.replace("IMAGE", "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>").replace(
    "{% else %}{{ c",
    "{% elif c['type'] == 'video' %}<|VISION_START|><|VIDEO_PAD|><|VISION_END|>{% else %}{{ c",
)
SIZE = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def cut(image: Image) -> torch.Tensor:
    """(rows, columns, 3, PATCH, PATCH) patches of an image, after plain resizing."""
    whole = pixels(image, *(side * SIDE for side in grid(image)))
    return whole.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)


@tiny("cohere_compass")
def cohere_compass() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        COHERE_TURNS,
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        image_token="<|IMAGE_PAD|>",
        video_token="<|VIDEO_PAD|>",
        vision_start_token="<|VISION_START|>",
        vision_end_token="<|VISION_END|>",
    )
    processor = with_videos(CohereCompassProcessor)(
        CohereCompassImageProcessorPil(patch_size=PATCH, size=SIZE),
        tokenizer,
        Videos(),
        chat_template=COHERE_VIDEO,
    )
    kinds = {
        "sliding_attention": {**ROPE, "mrope_section": [2, 1, 1]},
        "full_attention": None,  # without positions
    }
    config = CohereCompassConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config=decoder(
            tokenizer,
            logit_scale=0.5,
            sliding_window=16,
            layer_types=list(kinds) * 2,
            rope_parameters=kinds,
        ),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    return make(CohereCompassForConditionalGeneration, config), processor


DOTS = (
    "{%- for m in messages -%}<|{{ m['role'] }}|>{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|img|><|imgpad|><|endofimg|>"
    "{%- elif c['type'] == 'video' -%}<|img|><|video_pad|><|endofimg|>"
    "{%- elif c['type'] == 'audio' -%}<|audio_comp_pad|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}<|endof{{ m['role'] }}|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@tiny("dots3_note")
def dots3_note() -> tuple[PreTrainedModel, Any]:
    roles = ("system", "user", "assistant")
    marks = [mark for role in roles for mark in (f"<|{role}|>", f"<|endof{role}|>")]
    tokenizer = make_tokenizer(
        [*marks, "<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>", "<|audio_comp_pad|>"],
        eos="<|endofassistant|>",
    )
    processor = with_videos(Dots3NoteProcessor)(
        Qwen2VLImageProcessorPil(patch_size=PATCH, temporal_patch_size=1, size=SIZE),
        tokenizer,
        Videos(),
        Dots3NoteFeatureExtractor(),
        chat_template=DOTS,
    )
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = Dots3NoteConfig(
        vision_config={
            **UNSIZED,
            "moe_intermediate_size": 16,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
            "pyramid_num_routed": [-1, 4],
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 16,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
        text_config=decoder(
            tokenizer,
            num_key_value_heads=4,
            **ranks,
            qk_rope_head_dim=4,
            head_dim=12,
            **{f"swa_{name}": size for name, size in ranks.items()},
            swa_head_dim=12,
            swa_num_attention_heads=2,
            swa_num_key_value_heads=2,
            sliding_window=16,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            shared_experts_intermediate_size=16,
            index_topk=64,
            index_head_dim=8,
            index_n_heads=2,
        ),
        experts_implementation="eager",
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        audio_token_id=processor.audio_token_id,
    )
    return make(Dots3NoteForConditionalGeneration, config), processor


class MuseStandIn(StandIn):
    merge_size = 2

    def outputs(self, images: list[Image]) -> dict[str, Any]:
        patches = [cut(image) for image in images]
        flat = torch.cat([each.flatten(2).flatten(0, 1) for each in patches])
        return {
            "pixel_values": flat.repeat(1, 2),  # two frames an image
            "image_grid_thw": torch.tensor([[1, *each.shape[:2]] for each in patches]),
        }


MUSE_VIDEOS = Videos(frame_timestamp_format="Time: {timestamp:.1f}s")
MUSE = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{{ '<|header_start|>' + m['role'] + '<|header_end|>\\n\\n' }}"
    "{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}<|patch|>"
    "{%- elif c['type'] == 'video' -%}<|video|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}<|eot|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif -%}"
)


def _muse(processor_class: Any, **ears: Any) -> tuple[Any, dict[str, Any]]:
    """A processor, and what both families' configs take."""
    marks = [
        "<|header_start|>",
        "<|header_end|>",
        "<|patch|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|video|>",
        "<|vid_start|>",
        "<|vid_frame_separator|>",
        "<|vid_end|>",
        "<|audio|>",
        "<|soft_audio_start|>",
        "<|soft_audio_end|>",
    ]
    tokenizer = make_tokenizer(marks, bos="<|begin_of_text|>", eos="<|eot|>")
    processor = with_videos(processor_class)(
        MuseStandIn(), MUSE_VIDEOS, tokenizer, **ears, chat_template=MUSE
    )
    return processor, {
        "vision_config": {**UNSIZED, "pos_emb_height": 4, "pos_emb_width": 4},
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "out_hidden_size": 64,
        "projector_hidden_size": 32,
    }


@tiny("muse_glimmer")
def muse_glimmer() -> tuple[PreTrainedModel, Any]:
    processor, shared = _muse(MuseGlimmerProcessor)
    text = decoder(processor.tokenizer, head_dim=8, sliding_window=16)
    config = MuseGlimmerConfig(text_config=text, **shared)
    return make(MuseGlimmerForConditionalGeneration, config), processor


@tiny("muse_spark")
def muse_spark() -> tuple[PreTrainedModel, Any]:
    processor, shared = _muse(MuseSparkProcessor, feature_extractor=MuseSparkFeatureExtractor())
    processor.chat_template = MUSE.replace(
        "{%- else -%}{{ c", "{%- elif c['type'] == 'audio' -%}<|audio|>{%- else -%}{{ c"
    )
    text = decoder(
        processor.tokenizer,
        head_dim=8,
        sliding_window=16,
        moe_intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_hidden_size=16,
        mlp_layer_types=["dense", "sparse"] * 2,
    )
    config = MuseSparkConfig(
        text_config=text,
        experts_implementation="eager",
        audio_config={"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": 32},
        audio_token_id=processor.audio_token_id,
        **shared,
    )
    return make(MuseSparkForConditionalGeneration, config), processor


class Gemma4UnifiedStandIn(StandIn):
    def outputs(self, images: list[Image]) -> dict[str, Any]:
        most = 4 * (SIDE // PATCH) ** 2
        values = torch.zeros(len(images), most, 3 * PATCH**2)
        positions = torch.full((len(images), most, 2), -1)
        counts = []
        for number, image in enumerate(images):
            patches = cut(image).permute(0, 1, 3, 4, 2)
            rows, columns = patches.shape[:2]
            counts.append(rows * columns)
            values[number, : rows * columns] = patches.flatten(2).flatten(0, 1)
            places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
            positions[number, : rows * columns] = places.flip(-1)
        return {
            "pixel_values": values,
            "image_position_ids": positions,
            "num_soft_tokens_per_image": counts,
        }


@tiny("gemma4_unified")
def gemma4_unified() -> tuple[PreTrainedModel, Any]:
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
    processor = with_videos(Gemma4UnifiedProcessor)(
        Gemma4UnifiedAudioFeatureExtractor(),
        Gemma4UnifiedStandIn(),
        tokenizer,
        SoftTokenVideos(),
        chat_template=GEMMA4.replace("IMAGE", "<|image|>"),
    )
    config = Gemma4UnifiedConfig(
        vision_config={
            "patch_size": PATCH,
            "pooling_kernel_size": 1,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        },
        text_config={**TEXT, "vocab_size": len(tokenizer), "global_head_dim": 16},
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
    )
    return make(Gemma4UnifiedForConditionalGeneration, config), processor
