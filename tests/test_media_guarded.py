"""A request with a video or audio alone is guarded as one with an image, and its receipt counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from support.media import made, noise_inputs
from support.reference import small_guard, with_thresholds
from tiny import family_param, load_makers
from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.conversation import (
    encode_messages,
    noise_media,
    render_messages,
    user_message,
    without_media,
)
from vlm_safeguard.model.families import FAMILIES
from vlm_safeguard.model.generation_prompt import learn_generation_prompt
from vlm_safeguard.policy.edits import Restore
from vlm_safeguard.policy.gate import GATES, TextScore
from vlm_safeguard.policy.media import KINDS, Kind
from vlm_safeguard.policy.receipt import Receipt

pytestmark = pytest.mark.xdist_group("media")  # they share views, which are slow to learn
MAKERS = load_makers()
ASK = "How do I bake bread?"
HEARD_OR_SEEN = [
    family_param(name, kind)
    for name, family in FAMILIES.items()
    for kind in family.media
    if kind != "image"
]
#: Families whose small models run on what the stand-ins for their video processors give.
RUN = (
    *("qwen2_vl", "qwen3_vl", "llava_next_video", "llava_onevision", "gemma3n"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
)
OMNI = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")


@cache
def guarded(model_type: str) -> tuple[Any, Any, Guard]:
    """A family's small model, its processor, and a guard that brings back the text's coordinates.

    Its gate reads the text and opens to any.
    """
    model, processor = MAKERS[model_type]()
    guard = small_guard(model, processor)
    (reads,) = (each for each in guard.policy.gate if isinstance(each, TextScore))
    opened = reads.model_copy(update={"threshold": -1e6})
    return model, processor, guard.variant(gate=(opened,), edit=Restore(one_sided=False))


def receipts_of(
    model_type: str,
    conversations: Sequence[Sequence[dict[str, Any]]],
    image_threshold: float | None = None,
) -> list[Receipt]:
    """Of a batch of conversations, each with its own media of noise.

    Args:
        image_threshold: of a gate that reads the multimodal pass alone.
    """
    model, processor, guard = guarded(model_type)
    if image_threshold is not None:
        guard = with_thresholds(guard, 1e6, image=image_threshold)
    inputs = noise_inputs(processor, conversations)
    with guard.attach(model):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return list(guard.receipts)


def numbers(receipt: Receipt) -> tuple[int, int, int]:
    return receipt.images, receipt.videos, receipt.audios


def one_of(kind: Kind, number: int = 1) -> tuple[int, int, int]:
    first, second, third = (number * (each == kind) for each in KINDS)
    return first, second, third


# --- counts in receipts ---


def test_three_adjacent_images_in_llava_s_template_are_three_in_the_receipt() -> None:
    for count in (1, 2, 3):
        (receipt,) = receipts_of("llava", [[user_message(*["image"] * count, ASK)]])
        assert numbers(receipt) == (count, 0, 0)
        assert receipt.guarded


def test_images_with_nothing_between_them_are_counted_one_by_one_in_the_receipt() -> None:
    """As prompts for LLaVA are written by hand: `<image><image><image>`."""
    model, processor, guard = guarded("llava")
    for count in (1, 2, 3):
        rendered = render_messages(processor, [user_message(*["image"] * count, ASK)])
        text = rendered.replace("<image>\n", "<image>")
        images = [noise_image(number) for number in range(count)]
        inputs = processor(text=[text], images=[images], return_tensors="pt")
        with guard.attach(model):
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        (receipt,) = guard.receipts
        assert numbers(receipt) == (count, 0, 0)
        assert receipt.guarded


@pytest.mark.parametrize("model_type", OMNI)
def test_media_of_all_kinds_in_one_request_are_counted_apart(model_type: str) -> None:
    (alone,) = receipts_of(model_type, [[user_message("image", ASK)]])
    for parts, expected in (
        (("image", "video", "audio", ASK), (1, 1, 1)),
        (("audio", ASK, "image", "video"), (1, 1, 1)),
        (("video", "video", "image", "image", "image", ASK), (3, 2, 0)),
        (("audio", "audio", ASK, "audio", "image"), (1, 0, 3)),
    ):
        (receipt,) = receipts_of(model_type, [[user_message(*parts)]])
        assert numbers(receipt) == expected
        assert receipt.guarded
        assert receipt.text_tokens == alone.text_tokens
        assert receipt.findings == alone.findings


@pytest.mark.parametrize("model_type", OMNI)
def test_media_of_earlier_turns_are_counted_too(model_type: str) -> None:
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Bread."}]}
    turns = [user_message("audio", "Hello."), reply, user_message("video", ASK), reply]
    (receipt,) = receipts_of(model_type, [[*turns, user_message("image", "image", "Why?")]])
    assert numbers(receipt) == (2, 1, 1)
    (receipt,) = receipts_of(model_type, [[*turns, user_message("Why?")]])
    assert numbers(receipt) == (0, 1, 1)
    assert receipt.guarded


@pytest.mark.parametrize("model_type", OMNI)
def test_a_batch_may_mix_kinds(model_type: str) -> None:
    """Each row is judged and counted as it is alone; the one of text alone is left to the model."""
    asked: list[tuple[str, ...]] = [
        ("audio", ASK),
        (ASK,),
        ("image", "video", ASK),
        ("image", "image", "Why?"),
        ("video", ASK, "audio"),
    ]
    conversations = [[user_message(*parts)] for parts in asked]
    together = receipts_of(model_type, conversations)
    assert [receipt.guarded for receipt in together] == [True, False, True, True, True]
    assert "no image, video or audio in the request" in together[1].reason
    for receipt, conversation in zip(together, conversations, strict=True):
        (alone,) = receipts_of(model_type, [conversation])
        assert numbers(receipt) == numbers(alone)
        assert (receipt.media_tokens, receipt.text_tokens, receipt.guarded) == (
            alone.media_tokens,
            alone.text_tokens,
            alone.guarded,
        )
        assert receipt.scores == pytest.approx(alone.scores, rel=1e-3, abs=1e-4)


# --- guarded as an image is ---


@pytest.mark.parametrize(("model_type", "kind"), HEARD_OR_SEEN)
def test_every_family_edits_and_looks_at_a_request_of_one_kind_alone(
    model_type: str, kind: Kind
) -> None:
    """What is decided from the tokens, in families whose models cannot run it here, too."""
    processor, view = made(model_type)
    _, _, guard = guarded("llava")
    learnt = learn_generation_prompt(processor)
    policy = replace(guard.policy, text_view=view, generation_prompt=learnt)
    messages = [user_message(kind, ASK)]
    ids = encode_messages(processor, messages, noise_media(processor, messages))
    plain = encode_messages(processor, without_media(messages))
    batch = Batch.read(policy, torch.tensor([ids, [0] * (len(ids) - len(plain)) + plain]), None)
    first, second = batch.requests
    assert first.text == tuple(plain)
    assert (first.media.images, first.media.videos, first.media.audios) == one_of(kind)
    assert second.media.total == 0
    assert batch.editable.tolist() == [True, False]
    assert len(first.spanned) > 1 == len(second.spanned)  # from the medium on, not the end alone


@pytest.mark.parametrize("model_type", RUN)
def test_video_alone_and_audio_alone_are_guarded_as_an_image_is(model_type: str) -> None:
    """The same text, so the same decision, and coordinates as the text's own, whatever is shown."""
    receipts = {}
    for kind in FAMILIES[model_type].media:
        (receipts[kind],) = receipts_of(model_type, [[user_message(kind, ASK)]])
    image = receipts["image"]
    assert image.guarded
    assert len(receipts) > 1
    for kind, receipt in receipts.items():
        assert numbers(receipt) == one_of(kind)
        assert receipt.guarded
        assert receipt.reason == image.reason
        assert (receipt.layers, receipt.edit) == (image.layers, image.edit)
        assert receipt.findings == image.findings
        assert receipt.text_tokens == image.text_tokens
        assert receipt.harm_after == pytest.approx(image.harm_after, rel=1e-3, abs=1e-3)
        assert receipt.harm_before != receipt.harm_after


@pytest.mark.parametrize(("model_type", "kind"), [("gemma3n", "audio"), ("qwen3_vl", "video")])
def test_the_score_with_media_opens_the_gate_to_audio_or_video_alone(
    model_type: str, kind: Kind
) -> None:
    for threshold, opened in ((-1e6, True), (1e6, False)):
        (receipt,) = receipts_of(model_type, [[user_message(kind, ASK)]], threshold)
        assert receipt.guarded == opened
        assert ("with its media it scores" in receipt.reason) == opened
        assert "image_score" in receipt.scores


def test_a_video_that_is_refused_gives_no_token() -> None:
    model, processor = MAKERS["glm4v"]()
    messages = [user_message("video", "Why?")]
    shown = noise_media(processor, messages)
    ids = torch.tensor([encode_messages(processor, messages, shown)])
    processor.video_processor = None
    guard = small_guard(model, processor).variant(gate=GATES["open"])
    with guard.attach(model), pytest.raises(SafeguardError, match="a video that this guard"):
        model.generate(input_ids=ids, max_new_tokens=1)
