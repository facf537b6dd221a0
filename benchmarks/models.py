"""What is measured: models by name, their guards, and requests whose gate is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_safeguard import Guard
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.fit.policy import CALIBRATED
from vlm_safeguard.images import blank_image
from vlm_safeguard.loading import Loading, load_guard, load_model
from vlm_safeguard.model.backbone import chat_inputs, model_inputs
from vlm_safeguard.model.conversation import Chat, chat_of
from vlm_safeguard.pocket.architecture import CHAT_TEMPLATE
from vlm_safeguard.policy.gate import AnyCriterion, ImageScore
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.response import Response

NAMES = ("pocket", "llava-7b", "tiny")
GATES = {"open": "harmful", "closed": "harmless"}  # the requests that are asked for each
_FAR = 1e9  # beyond every score
_AT_ONCE = 32  # requests whose gates are read in one pass


@dataclass(frozen=True)
class Shape:
    """A LLaVA with random weights: its sizes, and where it runs."""

    text: dict[str, int]
    vision: dict[str, int]
    device: str
    dtype: torch.dtype


SHAPES = {
    "llava-7b": Shape(  # LLaVA-1.5-7B: 576 image tokens
        text={
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        device="cuda",
        dtype=torch.bfloat16,
    ),
    "tiny": Shape(
        text={
            "vocab_size": 4096,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        device="cpu",
        dtype=torch.float32,
    ),
}


def load(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """(model, processor) by name.

    Args:
        dtype: of a reference VLM's weights; the others have their own.

    Raises:
        SafeguardError: the model needs a GPU that is not here.
    """
    if name not in SHAPES:
        # where the published figures were measured
        return load_model(name, Loading(device="cpu", dtype=dtype))
    shape = SHAPES[name]
    if shape.device == "cuda" and not torch.cuda.is_available():
        raise SafeguardError(
            f"{name} has 7 billion weights in bfloat16 and is measured on a GPU; there is none "
            "here. Measure pocket, or try the programs with tiny."
        )
    processor = _processor(shape)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision),
        text_config=LlamaConfig(
            **shape.text,
            max_position_embeddings=4096,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=None,
        ),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(shape.vision["image_size"] // shape.vision["patch_size"]) ** 2,
        dtype=shape.dtype,
    )
    with torch.device(shape.device):  # made where it runs: no copy on the host
        model = LlavaForConditionalGeneration._from_config(config, dtype=shape.dtype).eval()
    model.generation_config.pad_token_id = 1
    model.generation_config.eos_token_id = None
    model.config._name_or_path = model.name_or_path = name
    return model, processor


def _processor(shape: Shape) -> LlavaProcessor:
    """A LLaVA processor whose tokenizer is trained on the shipped requests."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    anchors = [text for anchor in shipped_anchors() for text in (anchor.harmful, anchor.harmless)]
    tokenizer.train_from_iterator(
        [*anchors, *shipped_calibration(), "user\nassistant\n", "Yes yes No no"],
        trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    side, patch = shape.vision["image_size"], shape.vision["patch_size"]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": side, "width": side}, do_center_crop=False
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            additional_special_tokens=["<image>"],
            padding_side="left",
        ),
        patch_size=patch,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def fit(name: str, model: Any, processor: Any) -> Guard:
    """A guard fitted as users do it; `tiny`, which only tries the programs, on less."""
    if name != "tiny":
        return Guard.fit(model, processor)
    anchors, calibration = shipped_anchors()[:40], shipped_calibration()[:220]
    return Guard.fit(model, processor, anchors=anchors, calibration=calibration, gate=CALIBRATED)


def guard_for(name: str, model: Any, processor: Any) -> Guard:
    """A fitted guard; the Pocket VLM's is kept between runs."""
    if name in SHAPES:
        return fit(name, model, processor)
    return load_guard(None, name, model, processor)


def with_gate(name: str, guard: Guard, gate: str) -> Guard:
    """The guard whose gate will be "open" or "closed" for the requests that go with it.

    Random weights cannot tell harm, so their threshold is moved out of reach; what the gate
    computes, the model's own refusal included, stays the same.
    """
    if name not in SHAPES:
        return guard
    text, image = guard.policy.text_criterion, guard.policy.criterion(ImageScore)
    assert text is not None
    text = text.model_copy(update={"threshold": -_FAR if gate == "open" else _FAR})
    criteria: list[AnyCriterion] = [
        OwnRefusal(tokens=(3,), slack=0, layers=text.layers, score_above=_FAR),
        text,
    ]
    if image is not None:
        criteria.append(image.model_copy(update={"threshold": _FAR}))
    return guard.variant(gate=tuple(criteria))


def requests_with(
    model: Any,
    processor: Any,
    guard: Guard,
    gate: str,
    count: int,
    sentences: int = 1,
    before: Chat = (),
) -> list[str]:
    """The first `count` held-out requests, with a blank image, whose gate is as wanted.

    Args:
        sentences: that a request has, which is made of as many held-out ones.
        before: what stands before each, a system prompt say.

    Raises:
        SafeguardError: there are not so many.
    """
    prompts = [prompt.text for prompt in read_prompts(GATES[gate])]
    texts = [" ".join(some) for some in zip(*[iter(prompts)] * sentences, strict=False)]
    if guard.policy.sentences is not None:
        rows = [model_inputs(model, processor, [text], [None])["input_ids"][0] for text in texts]
        judged = [guard.policy.judged(tuple(row.tolist()))[1:] for row in rows]
        texts = [
            t for t, parts in zip(texts, judged, strict=True) if max(1, len(parts)) == sentences
        ]
    found: list[str] = []
    for start in range(0, len(texts), _AT_ONCE):
        asked = texts[start : start + _AT_ONCE]
        chats = [(*before, *chat_of(text, blank_image())) for text in asked]
        inputs = chat_inputs(model, processor, chats)
        as_wanted = [True] * len(asked)
        for each in (guard, guard.variant(response=Response.EDIT)):  # it reads texts otherwise
            with each.attach(model):
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
            for place, receipt in enumerate(each.receipts):
                as_wanted[place] &= receipt.guarded == (gate == "open")
        found += [text for text, fits in zip(asked, as_wanted, strict=True) if fits]
        if len(found) >= count:
            return found[:count]
    raise SafeguardError(f"Of {len(texts)} requests only {len(found)} have the gate {gate}.")
