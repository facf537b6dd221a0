"""Small models that the tests make: a random LLaVA, and one that knows harm from harmlessness."""

from __future__ import annotations

import pytest
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

from reference import make_exact
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.guard import Guard
from vlm_safeguard.pocket.architecture import CHAT_TEMPLATE
from vlm_safeguard.policy.gate import OpenGate

IMAGE_SIDE, PATCH = 32, 16  # 4 image tokens
LAYERS, WIDTH = 6, 32


def make_processor(chat_template: str = CHAT_TEMPLATE) -> LlavaProcessor:
    """A LLaVA processor whose tokenizer is trained here, on the shipped anchors."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [text for anchor in shipped_anchors() for text in (anchor.harmful, anchor.harmless)]
    tokenizer.train_from_iterator([*texts, "user\nassistant\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
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
        tokenizer=fast,
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


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return make_processor()


@pytest.fixture(scope="session")
def model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    return make_model(processor)


@pytest.fixture(scope="session")
def guard(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Guard:
    """Fitted with the shipped anchors, on fewer of the calibration requests, for speed.

    Its gate looks at the multimodal pass, too, whether or not harm is legible there.
    """
    fitted = Guard.fit(
        model, processor, calibration=shipped_calibration()[:220], layers=(2, 3), rank=5, hold=True
    )
    looks = {"image_layer": fitted.layers[0], "image_threshold": 100.0}
    return fitted.variant(gate=fitted.gate.model_copy(update=looks))


@pytest.fixture(scope="session")
def open_guard(guard: Guard) -> Guard:
    """Edits four of the six layers, always."""
    return guard.variant(layers=(1, 2, 3, 4), gate=OpenGate())


@pytest.fixture(scope="session")
def exact_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The same weights as `model`, in float64 throughout."""
    return make_exact(make_model(processor))
