"""Idefics and SmolVLM, Mistral, Llama, LFM, Kimi, MiniCPM-V and -OCR, and Aria."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaProcessor,
    BatchFeature,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25Processor,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlProcessor,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    Lfm3VlProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMOcrProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Processor,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Processor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.image_utils import make_flat_list_of_images
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ImagesKwargs

from tiny import make, make_tokenizer, tiny
from tiny.videos import ChunkedVideos, SlicedVideos, SmolVideos, Videos, with_videos

SIDE, PATCH = 32, 8
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIDE,
}
UNSIZED = {name: value for name, value in VISION.items() if name != "image_size"}

IDEFICS = (
    "{{ bos_token }}{%- for m in messages -%}{{ m['role'] | capitalize }}"
    "{%- if m['content'][0]['type'] == 'image' -%}:{%- else -%}{{ ': ' }}{%- endif -%}"
    "{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}<image>"
    "{%- elif c['type'] == 'video' -%}<video>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{{ '<end_of_utterance>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}Assistant:{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}[SYSTEM_PROMPT]{%- elif m['role'] == 'user' -%}[INST]"
    "{%- endif -%}{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}[IMG]"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}"
    "{%- if m['role'] == 'system' -%}[/SYSTEM_PROMPT]{%- elif m['role'] == 'user' -%}[/INST]"
    "{%- else -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
)
#: ChatML; `IMAGE` stands for the family's image token.
CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] + '\\n' }}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}IMAGE{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
MLLAMA = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}<|image|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}<|eot_id|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)


def decoder(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """What every text config takes."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": tokenizer.bos_token_id or 0,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


@tiny("idefics2")
def idefics2() -> tuple[PreTrainedModel, Any]:
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer = make_tokenizer(marks, bos="<s>", eos="<end_of_utterance>")
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(
            size={"longest_edge": SIDE, "shortest_edge": SIDE // 2}, do_image_splitting=True
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS,
    )
    config = Idefics2Config(
        vision_config=VISION,
        text_config={"model_type": "mistral", **decoder(tokenizer)},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return make(Idefics2ForConditionalGeneration, config), processor


def _idefics3(bos: str, images: Any, processor_class: Any, **videos: Any) -> tuple[Any, Any]:
    """A processor, and what every config of a family with Idefics3's tower takes."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    tokenizer = make_tokenizer(marks, bos=bos, eos="<end_of_utterance>")
    processor = processor_class(
        image_processor=images(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer=tokenizer,
        image_seq_len=(SIDE // PATCH // 2) ** 2,
        chat_template=IDEFICS,
        **videos,
    )
    return processor, {
        "vision_config": VISION,
        "text_config": {"model_type": "llama", **decoder(tokenizer)},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
    }


@tiny("idefics3")
def idefics3() -> tuple[PreTrainedModel, Any]:
    bos = "<|begin_of_text|>"
    processor, config = _idefics3(bos, Idefics3ImageProcessorPil, Idefics3Processor)
    return make(Idefics3ForConditionalGeneration, Idefics3Config(**config)), processor


@tiny("smolvlm")
def smolvlm() -> tuple[PreTrainedModel, Any]:
    """Its processor writes the number of a video's frames in words, by num2words."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    processing_smolvlm.num2words = lambda number: words[number]  # stands for that package
    processor, config = _idefics3(
        "<|im_start|>",
        SmolVLMImageProcessorPil,
        with_videos(SmolVLMProcessor),
        video_processor=SmolVideos(),
    )
    return make(SmolVLMForConditionalGeneration, SmolVLMConfig(**config)), processor


class PixtralLikeProcessor(ProcessorMixin):
    """Writes an image as PixtralProcessor does, which needs torchvision."""

    def __init__(
        self, image_processor: Any, tokenizer: Any, unit: int, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.unit = unit
        self.image_token = "[IMG]"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        height, width = image_inputs["image_sizes"][image_idx]
        row = "[IMG]" * (width // self.unit)
        return "[IMG_BREAK]".join([row] * (height // self.unit)) + "[IMG_END]"

    @property
    def model_input_names(self) -> list[str]:
        names: list[str] = super().model_input_names  # type: ignore[misc]
        return [*names, "image_sizes"]


def _mistral() -> tuple[Any, dict[str, Any]]:
    """A processor, and what every config of a family with Pixtral's tower takes."""
    marks = [
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
    ]
    tokenizer = make_tokenizer(marks, bos="<s>")
    processor = PixtralLikeProcessor(
        PixtralImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, patch_size={"height": 2 * PATCH, "width": 2 * PATCH}
        ),
        tokenizer,
        unit=2 * PATCH,
        chat_template=MISTRAL,
    )
    vision = {"model_type": "pixtral", **VISION, "head_dim": 8, "image_size": 2 * SIDE}
    return processor, {
        "vision_config": vision,
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


@tiny("mistral3")
def mistral3() -> tuple[PreTrainedModel, Any]:
    processor, shared = _mistral()
    text = {"model_type": "mistral", **decoder(processor.tokenizer, head_dim=8)}
    config = Mistral3Config(text_config=text, **shared)
    return make(Mistral3ForConditionalGeneration, config), processor


@tiny("mistral_large4")
def mistral_large4() -> tuple[PreTrainedModel, Any]:
    processor, shared = _mistral()
    text = decoder(
        processor.tokenizer,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_head_dim=8,
        index_n_heads=2,
        index_topk=64,  # all of a short prompt: scores that tie would fall by a row's length
    )
    config = MistralLarge4Config(text_config=text, experts_implementation="eager", **shared)
    return make(MistralLarge4ForConditionalGeneration, config), processor


@tiny("mllama")
def mllama() -> tuple[PreTrainedModel, Any]:
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
    tokenizer = make_tokenizer([*marks, "<|image|>"], bos="<|begin_of_text|>", eos="<|eot_id|>")
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        chat_template=MLLAMA,
    )
    vision = {name: value for name, value in VISION.items() if name != "num_attention_heads"}
    config = MllamaConfig(
        vision_config={
            **vision,
            "attention_heads": 2,
            "num_global_layers": 1,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
        text_config=decoder(tokenizer, num_hidden_layers=6, cross_attention_layers=[1, 4]),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return make(MllamaForConditionalGeneration, config), processor


class StandIn(CLIPImageProcessorPil):
    """For image processors that need torchvision: the same outputs, by plain resizing."""

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return BatchFeature(self.outputs(make_flat_list_of_images(images)))

    def outputs(self, images: list[Image]) -> dict[str, Any]:
        raise NotImplementedError


def grid(image: Image) -> tuple[int, int]:
    """Rows and columns of tiles that an image is cut into."""
    if image.width * image.height > 200 * 200:
        return 2, 2
    return (1, 2) if image.width > 2 * image.height else (1, 1)


def tiles(image: Image, overview: bool = True) -> list[torch.Tensor]:
    """(3, SIDE, SIDE) tiles of an image, in order, and if there are several, all of it."""
    rows, columns = grid(image)
    whole = pixels(image, rows * SIDE, columns * SIDE)
    found = [
        tile for row in torch.split(whole, SIDE, dim=1) for tile in torch.split(row, SIDE, dim=2)
    ]
    return [*found, pixels(image, SIDE, SIDE)] if len(found) > 1 and overview else found


def pixels(image: Image, height: int, width: int) -> torch.Tensor:
    array = np.asarray(image.convert("RGB").resize((width, height)), dtype=np.float32)
    return torch.tensor(array).permute(2, 0, 1) / 127.5 - 1


class Llama4StandIn(StandIn):
    def outputs(self, images: list[Image]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([tile for image in images for tile in tiles(image)]),
            "aspect_ratios": [grid(image) for image in images],
        }


@tiny("llama4")
def llama4() -> tuple[PreTrainedModel, Any]:
    marks = [
        "<|header_start|>",
        "<|header_end|>",
        "<|eot|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|image|>",
        "<|patch|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    ]
    tokenizer = make_tokenizer(marks, bos="<|begin_of_text|>", eos="<|eot|>")
    processor = Llama4Processor(
        image_processor=Llama4StandIn(), tokenizer=tokenizer, patch_size=PATCH
    )
    config = Llama4Config(
        vision_config={
            **VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 64,
        },
        text_config=decoder(
            tokenizer,
            head_dim=8,
            intermediate_size_mlp=64,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            attention_chunk_size=16,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )
    return make(Llama4ForConditionalGeneration, config), processor


class Lfm2Options(ImagesKwargs, total=False):  # type: ignore[call-arg]
    return_row_col_info: bool


class Lfm2StandIn(StandIn):
    valid_kwargs = Lfm2Options
    tile_size, downsample_factor, encoder_patch_size, use_thumbnail = SIDE, 2, PATCH, True

    def outputs(self, images: list[Image]) -> dict[str, Any]:
        every = torch.stack([tile for image in images for tile in tiles(image)])
        patches = every.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        flat = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        return {
            "pixel_values": flat,
            "pixel_attention_mask": torch.ones(flat.shape[:2], dtype=torch.int32),
            "spatial_shapes": torch.tensor([[SIDE // PATCH] * 2] * len(flat)),
            "image_rows": [grid(image)[0] for image in images],
            "image_cols": [grid(image)[1] for image in images],
            "image_sizes": [[SIDE, SIDE]] * len(images),
        }


@tiny("lfm2_vl")
def lfm2_vl() -> tuple[PreTrainedModel, Any]:
    places = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)]
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>", *places],
        bos="<|startoftext|>",
        eos="<|im_end|>",
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    processor = Lfm2VlProcessor(
        Lfm2StandIn(),
        tokenizer,
        chat_template="{{ bos_token }}" + CHATML.replace("IMAGE", "<image>"),
    )
    config = Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            **UNSIZED,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2",
            **decoder(tokenizer),
            "layer_types": ["conv", "full_attention"] * 2,
        },
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=32,
    )
    return make(Lfm2VlForConditionalGeneration, config), processor


class KimiStandIn(StandIn):
    merge_size = 2

    def outputs(self, images: list[Image]) -> dict[str, Any]:
        wholes = [pixels(image, *(side * SIDE for side in grid(image))) for image in images]
        patches = [
            whole.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)
            for whole in wholes
        ]
        return {
            "pixel_values": torch.cat([patch.flatten(0, 1) for patch in patches]),
            "image_grid_thw": torch.tensor([[1, *patch.shape[:2]] for patch in patches]),
        }


KIMI = (
    "{%- for m in messages -%}"
    "<|im_{{ m['role'] }}|>{{ m['role'] }}<|im_middle|>{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}"
    "{{ '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n' }}"
    "{%- elif c['type'] == 'video' -%}<|kimi_k25_video_placeholder|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


@tiny("kimi_k25")
def kimi_k25() -> tuple[PreTrainedModel, Any]:
    marks = [
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_system|>",
        "<|im_middle|>",
        "<|im_end|>",
        "<|media_begin|>",
        "<|media_content|>",
        "<|media_end|>",
    ]
    tokenizer = make_tokenizer(
        marks,
        eos="<|im_end|>",
        image_token="<|media_pad|>",
        video_token="<|kimi_k25_video_placeholder|>",
    )
    processor = with_videos(Kimi_K25Processor)(
        KimiStandIn(), tokenizer, ChunkedVideos(), chat_template=KIMI
    )
    config = Kimi_K25Config(
        vision_config={**UNSIZED, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config={
            "model_type": "deepseek_v3",
            **decoder(
                tokenizer,
                num_key_value_heads=4,
                moe_intermediate_size=16,
                n_routed_experts=4,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=4,
                v_head_dim=8,
                qk_nope_head_dim=8,
                n_group=1,
                topk_group=1,
                num_experts_per_tok=2,
                first_k_dense_replace=1,
            ),
        },
        experts_implementation="eager",
        projection_hidden_size=16,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|media_begin|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|media_end|>"),
    )
    return make(Kimi_K25ForConditionalGeneration, config), processor


#: ChatML, its content joined by line breaks.
MINICPM = CHATML.replace(
    "{%- endfor -%}{{ '<|im_end|>", "{{ '' if loop.last else '\n' }}{%- endfor -%}{{ '<|im_end|>"
).replace("IMAGE", "<|image_pad|>{%- elif c['type'] == 'video' -%}<|video_pad|>")


def _minicpm(processor_class: Any, config_class: Any) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        eos="<|im_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_start_token="<image>",
        image_end_token="</image>",
        slice_start_token="<slice>",
        slice_end_token="</slice>",
        image_id_start_token="<image_id>",
        image_id_end_token="</image_id>",
    )
    processor = with_videos(processor_class)(
        image_processor=MiniCPMV4_6ImageProcessorPil(
            scale_resolution=2 * SIDE, patch_size=PATCH, max_slice_nums=4
        ),
        video_processor=SlicedVideos(),
        tokenizer=tokenizer,
        chat_template=MINICPM,
    )
    config = config_class(
        vision_config={**VISION, "image_size": 2 * SIDE, "num_hidden_layers": 3},
        text_config={
            "model_type": "qwen3_5_text",
            **decoder(
                tokenizer,
                head_dim=8,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                layer_types=["linear_attention", "full_attention"] * 2,
            ),
        },
        insert_layer_id=1,
        image_size=2 * SIDE,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return config, processor


@tiny("minicpmv4_6")
def minicpmv4_6() -> tuple[PreTrainedModel, Any]:
    config, processor = _minicpm(MiniCPMV4_6Processor, MiniCPMV4_6Config)
    return make(MiniCPMV4_6ForConditionalGeneration, config), processor


@tiny("minicpmv4_7")
def minicpmv4_7() -> tuple[PreTrainedModel, Any]:
    config, processor = _minicpm(MiniCPMV4_7Processor, MiniCPMV4_7Config)
    return make(MiniCPMV4_7ForConditionalGeneration, config), processor


@tiny("minicpm_ocr")
def minicpm_ocr() -> tuple[PreTrainedModel, Any]:
    config, processor = _minicpm(MiniCPMOcrProcessor, MiniCPMOcrConfig)
    config.downsample_mode = "16x"  # as its image processor's, which needs torchvision
    return make(MiniCPMOcrForConditionalGeneration, config), processor


@tiny("aria")
def aria() -> tuple[PreTrainedModel, Any]:
    marks = ["<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>"]
    tokenizer = make_tokenizer(marks, eos="<|im_end|>", image_token="<|img|>")
    processor = AriaProcessor(
        image_processor=AriaImageProcessorPil(max_image_size=490, min_image_size=336),
        tokenizer=tokenizer,
        size_conversion={490: 4},
        chat_template=CHATML.replace("IMAGE", "<fim_prefix><|img|><fim_suffix>"),
    )
    processor.images_kwargs = {"max_image_size": 490}
    config = AriaConfig(
        vision_config={
            "model_type": "idefics3_vision",
            **VISION,
            "patch_size": 49,
            "image_size": 490,
        },
        text_config=decoder(tokenizer, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        experts_implementation="eager",
        projector_patch_to_query_dict={100: 4},
        image_token_index=tokenizer.image_token_id,
    )
    return make(AriaForConditionalGeneration, config), processor


@tiny("lfm3_vl")
def lfm3_vl() -> tuple[PreTrainedModel, Any]:
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        bos="<|startoftext|>",
        eos="<|im_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    video = "{%- elif c['type'] == 'video' -%}" + image.replace("image", "video")
    processor = with_videos(Lfm3VlProcessor)(
        Qwen2VLImageProcessorPil(
            patch_size=PATCH, size={"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
        ),
        tokenizer,
        Videos(),
        chat_template="{{ bos_token }}" + CHATML.replace("IMAGE", image + video),
    )
    config = Lfm3VlConfig(
        vision_config={
            **UNSIZED,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        text_config={
            "model_type": "lfm3",
            **decoder(
                tokenizer,
                head_dim=8,
                sliding_window=16,
                layer_types=["conv", "sliding_attention", "full_attention", "conv"],
            ),
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
        projector_hidden_size=32,
    )
    return make(Lfm3VlForConditionalGeneration, config), processor
