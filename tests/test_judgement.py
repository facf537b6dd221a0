"""Requests judged without an answer: as `generate` judges them, by their texts alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask, run_row, with_thresholds
from vlm_safeguard.engines.hooks.text_passes import TextReadings
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.response import Response

Model = LlavaForConditionalGeneration
NEW = 6
PREFIX = (20, 21, 22)


@pytest.fixture
def halved(model: Model, processor: LlavaProcessor, guard: Guard) -> Guard:
    """Its gate opens for half of the questions, by their texts; its refusals begin in words."""
    with with_thresholds(guard, 1e9).attach(model) as attachment:
        receipts = attachment.generate(**ask(processor, QUESTIONS), max_new_tokens=1).receipts
    scores = sorted(receipt.scores["text_score"] for receipt in receipts)
    halved = with_thresholds(guard, (scores[1] + scores[2]) / 2)
    return halved.variant(response=Response.REFUSAL, refusal_prefix=PREFIX)


def rows(inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Token ids without their padding."""
    kept = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in kept]


@contextmanager
def counting(*modules: Any) -> Iterator[list[str]]:
    """The names of the modules that run, pass by pass."""
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: ran.append(type(module).__name__))
        for module in modules
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("response", [Response.TEXT, Response.REFUSAL])
def test_a_judgement_is_what_generate_decides_and_answers_from(
    model: Model, processor: LlavaProcessor, halved: Guard, response: Response
) -> None:
    guard = halved.variant(response=response)
    inputs, plain = ask(processor, QUESTIONS), ask(processor, QUESTIONS, images=False)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
    with guard.attach(model) as attachment:
        judged = attachment.judge(**inputs)
        assert attachment.receipts == [each.receipt for each in judged]
        unseen = attachment.judge(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        output, receipts = attachment.generate(**inputs, **options)
    assert judged == unseen
    assert [each.receipt for each in judged] == receipts
    assert [each.text for each in judged] == rows(plain)
    assert sum(receipt.guarded for receipt in receipts) == 2
    for each, row in zip(judged, output[:, inputs["input_ids"].shape[1] :], strict=True):
        refuses = each.receipt.guarded and response is Response.REFUSAL
        assert each.beginning == (PREFIX if refuses else ())
        if not each.receipt.guarded:
            continue
        ids = torch.tensor([[*each.text, *each.beginning]])
        rest = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW - len(each.beginning),
        )
        assert row.tolist() == rest[0, len(each.text) :].tolist()


@pytest.mark.parametrize("kept", [False, True])
def test_a_refusal_begins_as_the_model_would_in_the_language_it_is_asked_in(
    model: Model, processor: LlavaProcessor, guard: Guard, kept: bool
) -> None:
    """By the likeliest of the refusals' first tokens behind the text, against a pass of its own."""
    plain = ask(processor, QUESTIONS, images=False)
    behind = torch.stack([run_row(model, list(row))[1][-1] for row in rows(plain)])
    one, *others = behind.argmax(-1).tolist()
    other = next(token for token in others if token != one)
    firsts = behind[:, [one, other]].argmax(-1).tolist()
    prefixes = ((one, 21, 22), (other, 23))
    never = int(behind.amax(0).argmin())
    asking = with_thresholds(guard, -1e9, tokens=(never,)).variant(
        response=Response.REFUSAL, refusal_prefix=prefixes[0], other_prefixes=prefixes[1:]
    )
    inputs = ask(processor, QUESTIONS)
    with asking.attach(model, readings=TextReadings() if kept else None) as attachment:
        for _ in range(2):
            judged = attachment.judge(**inputs)
            assert [each.beginning for each in judged] == [prefixes[first] for first in firsts]
        output, _ = attachment.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    for each, row in zip(judged, output[:, inputs["input_ids"].shape[1] :], strict=True):
        assert tuple(row[: len(each.beginning)].tolist()) == each.beginning


def test_nothing_is_generated_and_no_image_read(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    inner: Any = model
    inputs = ask(processor, QUESTIONS)
    with halved.attach(model) as attachment:
        with counting(model, inner.model.vision_tower, inner.lm_head) as ran:
            attachment.judge(**inputs)
        assert not {"LlavaForConditionalGeneration", "CLIPVisionModel"} & set(ran)
        with counting(model, inner.model.vision_tower) as ran:
            attachment.generate(**inputs, max_new_tokens=1)
        assert {"LlavaForConditionalGeneration", "CLIPVisionModel"} <= set(ran)


def test_what_was_read_is_not_read_again_while_it_is_kept(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    readings = TextReadings()
    inputs, decoder = ask(processor, QUESTIONS), Backbone.of(model).decoder
    never = with_thresholds(halved, 1e9)
    with never.attach(model, readings=readings) as attachment:
        with counting(decoder) as ran:
            attachment.judge(**inputs)
        assert len(ran) == 1
        with counting(decoder) as ran:
            attachment.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        assert len(ran) == 3
        readings.clear()
        assert not readings.states
        assert not readings.final
        with counting(decoder) as ran:
            attachment.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        assert len(ran) == 4


def test_a_request_without_an_image_is_not_asked(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    plain = ask(processor, QUESTIONS, images=False)
    with halved.variant(gate=GATES["open"]).attach(model) as attachment:
        judged = attachment.judge(**plain)
    assert not any(each.receipt.guarded or each.receipt.findings for each in judged)
    assert [each.text for each in judged] == rows(plain)


def test_where_a_text_does_not_say_what_becomes_of_a_request_it_is_not_judged(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    inputs = ask(processor, QUESTIONS)
    edits = halved.variant(response=Response.EDIT)
    looks = with_thresholds(halved, 0.0, image=0.0)
    for guard, reason in ((edits, "it edits"), (looks, "looks at the pass over the image")):
        assert not guard.policy.text_suffices
        with guard.attach(model) as attachment, pytest.raises(SafeguardError, match=reason):
            attachment.judge(**inputs)


def test_what_cannot_be_judged_is_an_error(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    inputs = ask(processor, QUESTIONS)
    ids = inputs["input_ids"]
    attachment = halved.attach(model)
    with pytest.raises(SafeguardError, match="not on yet"):
        attachment.judge(**inputs)
    with attachment:
        with pytest.raises(SafeguardError, match="attention_mask"):
            attachment.judge(input_ids=ids)
        with pytest.raises(SafeguardError, match="padded on the right"):
            attachment.judge(**ask(processor, QUESTIONS, side="right"))
        with pytest.raises(SafeguardError, match="inputs_embeds"):
            attachment.judge(inputs_embeds=torch.zeros(1, 3, 4))
