"""Model types that are known: what they are called, and which are verified or refused.

A type is verified where the tests ran every check on a small model of it; see `tests/families`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vlm_safeguard.policy.media import KINDS, Kind

#: Attributes by which configs name the tokens that stand for media.
PLACEHOLDERS = tuple(
    f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index")
)


@dataclass(frozen=True)
class Family:
    """What has to be known about a model type beyond its structure.

    Attributes:
        placeholders: config attributes that hold the ids standing for patches of images and
            videos, and for audio.
        media: kinds that a guard takes out of a request's text as the chat template would.
        refused: kinds that the processor takes and a guard refuses in a request.
        skipped: attribute of the text config that lists layers which text without images does
            not pass (cross-attention); None where there are none.
        streams: attribute of the text config that says how many residual streams, each of the
            hidden size, a layer's output holds; None where there is one.
        streams_at: the dimension of a layer's output that counts them; None where they stand side
            by side in the last.
        bidirectional: whether all of a prompt's tokens attend to each other, not to earlier ones
            only.
        multiplier: attribute of the text config that the model multiplies its logits by; None
            where it does not, whatever its text config holds.
        divisor: the one it divides them by.
    """

    placeholders: tuple[str, ...] = ("image_token_id",)
    media: tuple[Kind, ...] = ("image",)
    refused: tuple[Kind, ...] = ()
    skipped: str | None = None
    streams: str | None = None
    streams_at: int | None = None
    bidirectional: bool = False
    multiplier: str | None = None
    divisor: str | None = None


_VIDEO = Family(placeholders=("image_token_id", "video_token_id"), media=("image", "video"))
_AUDIO = Family(placeholders=("image_token_id", "video_token_id", "audio_token_id"), media=KINDS)

#: Verified model types: a small model of each passes every check of the doctor, in the tests.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("aria", "aya_vision", "cohere2_vision", "deepseek_ocr2", "deepseek_vl"),
            *("deepseek_vl_hybrid", "fast_vlm", "gemma3", "hunyuan_vl", "idefics2", "idefics3"),
            *("janus", "lfm2_vl"),
            *("lighton_ocr", "llama4", "llava", "llava_next", "mistral3", "mistral_large4"),
            *("ovis2", "qianfan_ocr", "step3p7", "unlimited_ocr", "vipllava"),
        ),
        Family(),
    ),
    **dict.fromkeys(
        (
            *("cosmos3_edge", "cosmos3_omni", "ernie4_5_vl_moe", "exaone4_5"),
            *("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"),
            *("kimi_k25", "lfm3_vl", "llava_next_video", "llava_onevision", "minicpm_ocr"),
            *("minicpmv4_6", "minicpmv4_7", "perception_lm"),
            *("qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
            *("video_llama_3", "video_llava"),
        ),
        _VIDEO,
    ),
    **dict.fromkeys(
        (
            *("dots3_note", "gemma4", "gemma4_unified", "qwen2_5_omni_thinker"),
            "qwen3_omni_moe_thinker",
        ),
        _AUDIO,
    ),
    "cohere_compass": replace(_VIDEO, multiplier="logit_scale"),
    "gemma3n": Family(
        placeholders=("image_token_id", "audio_token_id"),
        media=("image", "audio"),
        streams="altup_num_inputs",
        streams_at=0,
    ),
    "glm5_next": replace(_VIDEO, streams="hc_mult", streams_at=2),
    "granite4_vision": Family(divisor="logits_scaling"),
    "granite_docling": Family(divisor="logits_scaling"),
    "hyperclovax_vision_v2": replace(_VIDEO, multiplier="logits_scaling"),
    "internvl": Family(media=("image", "video")),
    "mllama": Family(skipped="cross_attention_layers"),
    "molmo2": Family(media=("image", "video")),
    "muse_glimmer": replace(_VIDEO, multiplier="output_multiplier"),
    "muse_spark": replace(_AUDIO, multiplier="output_multiplier"),
    "paddleocr_vl": Family(placeholders=_VIDEO.placeholders, refused=("video",)),
    "paligemma": Family(bidirectional=True),
    "qwen4_exp": replace(_VIDEO, streams="hc_count"),
    "smolvlm": Family(refused=("video",)),
}

#: Processors that write the prompt themselves, around one turn's text that comes with an image:
#: their checkpoints have no chat template, and they refuse a request without an image.
SELF_PROMPTING = ("PaliGemmaProcessor",)

_ENCODER_DECODER = "an encoder-decoder: its language model reads no prompt of text and images"
_NO_CHAT = "not a chat model: it has no conversation to take the image out of"
_UNCHECKED = "no small model of it has been checked yet; `vlm-safeguard doctor MODEL` checks yours"

#: Model types that are not guarded, and why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop"),
            "vision-encoder-decoder",
        ),
        _ENCODER_DECODER,
    ),
    **dict.fromkeys(
        (
            *("blip", "blip-2", "fuyu", "git", "instructblip", "instructblipvideo", "kosmos-2"),
            "kosmos-2.5",
        ),
        _NO_CHAT,
    ),
    **dict.fromkeys(
        ("emu3", "inkling2", "inkling_mm_model", "nemotron_h_omni"),
        _UNCHECKED,
    ),
    "chameleon": "its processor takes no chat template, so there is no conversation to read",
    "diffusion_gemma": "it generates by diffusion, not token after token",
    "evolla": "it reads proteins, not images",
    "got_ocr2": "its processor refuses a request without an image, so there is no text-only view",
    "idefics": "its model makes no pass without an image, so there is no text-only view",
    "minimax_m3_vl": "its sparse attention reads a padded prompt otherwise than the same one alone",
    "mistral4": "a language model that sees no images",
    "pi0": "it steers robots; it is not a language model",
    "pp_chart2table": "it reads charts and has no conversation to take the image out of",
    "shieldgemma2": "a classifier of images, not a chat model",
}


def every_family() -> list[dict[str, Any]]:
    """Every vision-language type that the installed transformers knows, with its status."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
    )

    rows = []
    for name in sorted({*KNOWN, *FAMILIES}):
        family = FAMILIES.get(name)
        rows.append(
            {
                "type": name,
                "status": "refused" if family is None else "verified",
                "reason": None if family else REFUSED.get(name, _UNCHECKED),
                "placeholders": list(family.placeholders) if family else [],
                "media": list(family.media) if family else [],
                "refused media": list(family.refused) if family else [],
            }
        )
    return rows
