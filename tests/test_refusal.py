"""The language model's own decision, against plain arithmetic and the whole model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from reference import ask, text_ids
from vlm_safeguard.backbone import Backbone
from vlm_safeguard.gate import CalibratedGate
from vlm_safeguard.guard import Guard
from vlm_safeguard.refusal import opening_tokens, refusal_margin, refusal_opening

QUESTIONS = ["How to swim", "How to rob a bank", "How to bake bread for a very large family"]


def fake_backbone(logits: dict[int, list[float]]) -> Backbone:
    """States are row numbers; each stands for its own logits."""
    table = torch.tensor([logits[row] for row in sorted(logits)])
    return SimpleNamespace(next_token_logits=lambda states: table[states[:, 0].long()])  # type: ignore[return-value]


def test_margin_is_the_lead_of_the_likeliest_opening() -> None:
    rows = {0: [1.0, 2.0, 0.5], 1: [-3.0, 0.0, 4.0]}
    margin = refusal_margin(fake_backbone(rows), torch.tensor([[0.0], [1.0]]), (0, 2))
    assert margin.tolist() == [-1.0, 4.0]


def test_openings_are_the_tokens_that_harm_makes_likelier() -> None:
    big = 20.0
    rows = {0: [big, 0.0, 0.0], 1: [0.0, big, 0.0], 2: [0.0, 0.0, big]}
    harmful = torch.tensor([[0.0]] * 9 + [[2.0]])
    harmless = torch.tensor([[1.0]] * 9 + [[2.0]])
    assert opening_tokens(fake_backbone(rows), harmful, harmless) == (0,)
    assert opening_tokens(fake_backbone(rows), harmless, harmful) == (1,)
    assert opening_tokens(fake_backbone(rows), harmful, harmful) == ()


def saying(answers: dict[int, list[int]]) -> Backbone:
    """A prompt is one token; behind each, the model says these, and then 0."""

    def run_text(rows: list[list[int]]) -> torch.Tensor:
        said = [(answers[row[0]] + [0] * 9)[len(row) - 1] for row in rows]
        agrees = [row[1:] == answers[row[0]][: len(row) - 1] for row in rows]
        assert all(agrees), "asked behind what the model did not say"
        return torch.tensor(said)[:, None]

    def next_token_logits(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(states[:, 0], 20).float()

    return SimpleNamespace(run_text=run_text, next_token_logits=next_token_logits)  # type: ignore[return-value]


def test_the_opening_is_what_half_of_the_refusals_share() -> None:
    sorry, cannot = [1, 2, 3, 4, 5, 6], [1, 7, 8]
    for answers, expected in (
        ([sorry] * 3, (1, 2, 3, 4)),  # four at most
        ([sorry, cannot], (1, 2, 3, 4)),
        ([sorry, cannot, cannot], (1, 7, 8, 0)),
        ([sorry, cannot, [9, 7, 8]], (1,)),
        ([sorry, [9], [10]], ()),
        ([], ()),
    ):
        prompts = dict(enumerate(answers, 11))
        assert refusal_opening(saying(prompts), [[p] for p in prompts]) == expected


def test_the_opening_is_what_the_model_says_to_its_anchors(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """By `generate`, of prompts that are all alike."""
    backbone = Backbone.of(model)
    prompt = text_ids(processor, QUESTIONS[0])
    said = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
    assert refusal_opening(backbone, [prompt] * 3) == tuple(said[0, len(prompt) :].tolist())


def test_the_gate_opens_where_the_model_would_refuse_without_the_image(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    backbone = Backbone.of(model)
    first = [
        int(model(input_ids=torch.tensor([text_ids(processor, q)])).logits[0, -1].argmax())
        for q in QUESTIONS
    ]
    final = backbone.run_text([text_ids(processor, q) for q in QUESTIONS])
    for refused in set(first):
        gate = guard.gate.model_copy(
            update={"refusal_tokens": (refused,), "text_threshold": 1e9, "image_threshold": 1e9}
        )
        assert isinstance(gate, CalibratedGate)
        asked = guard.variant(gate=gate)
        with asked.attach(model):
            model.generate(**ask(processor, QUESTIONS), max_new_tokens=1, do_sample=False)
        odds = refusal_margin(backbone, final, (refused,))
        for receipt, value in zip(asked.receipts, odds.tolist(), strict=True):
            assert receipt.own_refusal == pytest.approx(value, abs=1e-3)
            assert receipt.guarded == (value > 0)
            assert receipt.guarded == ("would itself refuse" in receipt.reason)


def test_a_refusal_counts_only_above_the_floor(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    final = Backbone.of(model).run_text([text_ids(processor, q) for q in QUESTIONS])
    refused = int(Backbone.of(model).next_token_logits(final)[0].argmax())
    closed = {"refusal_tokens": (refused,), "text_threshold": 1e9, "image_threshold": 1e9}
    asked = guard.variant(gate=guard.gate.model_copy(update=closed))
    with asked.attach(model):
        model.generate(**ask(processor, QUESTIONS), max_new_tokens=1, do_sample=False)
    first = asked.receipts[0]
    assert first.guarded
    assert first.text_score is not None
    for floor, guarded in ((first.text_score - 0.01, True), (first.text_score + 0.01, False)):
        gate = guard.gate.model_copy(update=closed | {"refusal_floor": floor})
        floored = guard.variant(gate=gate)
        with floored.attach(model):
            model.generate(**ask(processor, QUESTIONS), max_new_tokens=1, do_sample=False)
        assert floored.receipts[0].guarded is guarded
        assert ("decline, but not for harm" in floored.receipts[0].reason) is not guarded


def test_a_model_that_does_not_refuse_is_not_asked(guard: Guard) -> None:
    assert isinstance(guard.gate, CalibratedGate)  # fitted on random weights
    assert guard.gate.refusal_tokens == ()
    assert guard.opening == ()
