"""The language model's own decision, against plain arithmetic and the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import ask, text_ids, with_thresholds
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.refusal import (
    declined_prefix_margins,
    prefix_margins,
    read_opening,
    refusal_margins,
    refusal_prefix,
    refusal_tokens,
)
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.refusal import likeliest_prefixes

QUESTIONS = ["How to swim", "How to rob a bank", "How to bake bread for a very large family"]


def fake_backbone(logits: dict[int, list[float]]) -> Backbone:
    """States are row numbers; each stands for its own logits."""
    table = torch.tensor([logits[row] for row in sorted(logits)])
    return SimpleNamespace(next_token_logits=lambda states: table[states[:, 0].long()])  # type: ignore[return-value]


def test_margin_is_the_lead_of_the_likeliest_opening() -> None:
    rows = {0: [1.0, 2.0, 0.5], 1: [-3.0, 0.0, 4.0]}
    margin = refusal_margins(fake_backbone(rows), torch.tensor([[0.0], [1.0]]), (0, 2))
    assert margin.tolist() == [-1.0, 4.0]


def test_a_refusal_is_begun_by_the_likeliest_of_the_first_tokens() -> None:
    logits = torch.tensor([[5.0, 1.0, 2.0], [0.0, 3.0, 1.0], [0.0, 1.0, 4.0]])
    prefixes = ((1, 0), (), (2, 2))
    assert likeliest_prefixes(logits, prefixes) == [(2, 2), (1, 0), (2, 2)]
    assert likeliest_prefixes(logits, [()]) == [()] * 3
    states = torch.arange(3.0)[:, None]
    rows = dict(enumerate(logits.tolist()))
    opening = read_opening(fake_backbone(rows), states.repeat(50, 1), (2,), prefixes)
    assert opening.likeliest == [(2, 2), (1, 0), (2, 2)] * 50
    assert opening.begun == [(1, 0), (1, 0), (2, 2)] * 50  # where none begins with it, the first
    assert opening.margin.tolist() == [-3.0, -2.0, 3.0] * 50


def test_openings_are_the_tokens_that_harm_makes_likelier() -> None:
    big = 20.0
    rows = {0: [big, 0.0, 0.0], 1: [0.0, big, 0.0], 2: [0.0, 0.0, big]}
    harmful = torch.tensor([[0.0]] * 9 + [[2.0]])
    harmless = torch.tensor([[1.0]] * 9 + [[2.0]])
    assert refusal_tokens(fake_backbone(rows), harmful, harmless, 0.05) == (0,)
    assert refusal_tokens(fake_backbone(rows), harmless, harmful, 0.05) == (1,)
    assert refusal_tokens(fake_backbone(rows), harmful, harmful, 0.05) == ()


def saying(answers: dict[int, list[int]]) -> Backbone:
    """A prompt is one token; behind each, the model says these, and then 0."""

    def run_text(rows: Sequence[Sequence[int]], answer: tuple[int, ...] = ()) -> torch.Tensor:
        assert all(answers[row[0]][: len(answer)] == list(answer) for row in rows), (
            "asked behind what the model did not say"
        )
        said = [(answers[row[0]] + [0] * 15)[: len(answer) + 1] for row in rows]
        return torch.tensor(said)[:, :, None]

    def read_texts(texts: Sequence[tuple[int, ...]]) -> Any:
        return SimpleNamespace(final=run_text(texts)[:, 0] if texts else None)

    def go_on(_: Any, texts: Sequence[tuple[int, ...]], answer: tuple[int, ...]) -> torch.Tensor:
        return run_text(texts, answer)[:, 1:]

    def next_token_logits(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(states[:, 0], 20).float()

    return SimpleNamespace(  # type: ignore[return-value]
        read_texts=read_texts, go_on=go_on, next_token_logits=next_token_logits
    )


def test_the_opening_is_what_half_of_the_refusals_share() -> None:
    sorry, cannot = [1, *range(2, 18)], [1, 7, 8, *[0] * 15]
    for answers, expected in (
        ([sorry] * 3, tuple(sorry[:12])),  # twelve at most
        ([sorry, cannot], tuple(sorry[:12])),
        ([sorry, cannot, cannot], tuple(cannot[:12])),
        ([sorry, cannot, [9, 7, 8, 0]], (1,)),
        ([sorry, [9, 0], [10, 0]], ()),
        ([], ()),
    ):
        prompts = dict(enumerate(answers, 11))
        backbone, texts = saying(prompts), [(prompt,) for prompt in prompts]
        assert refusal_prefix(backbone, backbone.read_texts(texts), texts, 12) == expected


def test_the_opening_is_what_the_model_says_to_its_anchors(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """By `generate`, of prompts that are all alike."""
    backbone = Backbone.of(model)
    prompt = text_ids(processor, QUESTIONS[0])
    said = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    prompts = [tuple(prompt)] * 3
    prefix = refusal_prefix(backbone, backbone.read_texts(prompts), prompts, 12)
    assert prefix == tuple(said[0, len(prompt) :].tolist())


def test_the_gate_opens_where_the_model_would_refuse_without_the_image(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    backbone = Backbone.of(model)
    first = [
        int(model(input_ids=torch.tensor([text_ids(processor, q)])).logits[0, -1].argmax())
        for q in QUESTIONS
    ]
    final = backbone.run_text([text_ids(processor, q) for q in QUESTIONS])[:, 0]
    for refused in set(first):
        asked = with_thresholds(guard, 1e9, image=1e9, tokens=(refused,))
        with asked.attach(model):
            model.generate(**ask(processor, QUESTIONS), max_new_tokens=1, do_sample=False)
        odds = refusal_margins(backbone, final, (refused,))
        for receipt, value in zip(asked.receipts, odds.tolist(), strict=True):
            assert receipt.scores.get("own_refusal") == pytest.approx(value, abs=1e-3)
            assert receipt.guarded == (value > 0)
            assert receipt.guarded == ("would itself refuse" in receipt.reason)


def test_a_refusal_counts_in_the_usual_words_or_where_the_text_scores_harmful(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    """The words by `generate`, without the image; the score by moving the anchors' middle."""
    prompt = torch.tensor([text_ids(processor, QUESTIONS[0])])
    out = model.generate(
        prompt, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    said = out.sequences[0, prompt.shape[1] :].tolist()
    leads = [logits[0].max() - logits[0] for logits in out.logits]
    unlikely = int(leads[2].argmax())  # a last word that it would hardly say
    nearly = int(leads[2].where(leads[2] < 0.9, 0.0).argmax())  # … and one that it might
    assert float(leads[2][unlikely]) > 1
    assert 0 < float(leads[2][nearly]) < 1
    gate = with_thresholds(guard, 1e9, image=1e9, tokens=(said[0],)).policy.gate
    for opening, usual in (
        ([], True),
        (said[:1], True),
        (said, True),
        ([*said[:2], nearly], True),
        ([*said[:2], unlikely], False),
    ):
        for harmful in (True, False):
            moved = guard.policy.directions.harmful_mean - guard.policy.directions.harmless_mean
            shift = (-50.0 if harmful else 50.0) * moved
            directions = replace(
                guard.policy.directions,
                harmful_mean=guard.policy.directions.harmful_mean + shift,
                harmless_mean=guard.policy.directions.harmless_mean + shift,
            )
            asked = guard.variant(gate=gate, refusal_prefix=tuple(opening), directions=directions)
            with asked.attach(model):
                model.generate(**ask(processor, QUESTIONS[:1]), max_new_tokens=1, do_sample=False)
            (receipt,) = asked.receipts
            assert "text_score" in receipt.scores
            assert (receipt.scores["text_score"] > 0) is harmful
            assert ("own_opening" in receipt.scores) is not harmful  # there words decide nothing
            if not harmful:
                assert (receipt.scores["own_opening"] > -1) is usual
                assert (receipt.scores["own_opening"] > 0) is (opening == said[: len(opening)])
            assert receipt.guarded is (usual or harmful)
            assert ("decline, but not for harm" in receipt.reason) is not receipt.guarded


def test_the_openings_margin_is_its_weakest_tokens_lead() -> None:
    rows = {0: [5.0, 1.0, 0.0], 1: [0.0, 3.0, 1.0], 2: [2.0, 2.5, 0.0]}
    backbone = fake_backbone(rows)
    states = torch.tensor([[[0.0], [1.0], [2.0]], [[0.0], [2.0], [2.0]], [[1.0], [1.0], [1.0]]])
    declined = torch.ones(3)
    assert prefix_margins(backbone, states, (0, 1), declined).tolist() == [2.0, 0.5, -3.0]
    declined[1] = -0.25  # its first token does not lead, so its words are not read
    assert prefix_margins(backbone, states, (0, 1), declined).tolist() == [2.0, -0.25, -3.0]
    assert prefix_margins(backbone, states, (), declined).tolist() == declined.tolist()


def test_words_are_read_behind_declined_requests_alone(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """By a whole pass of each, with the words that its likeliest token begins.

    What all begin with is read once.
    """
    backbone = Backbone.of(model)
    rows = [text_ids(processor, question) for question in [*QUESTIONS, *reversed(QUESTIONS)]]
    final = backbone.run_text(rows)[:, 0]
    first = backbone.next_token_logits(final).argmax(-1).tolist()
    prefixes = ((20, 21, 22), (first[0], 23))
    margins = torch.tensor([3.0, 0.5, -1.0, 2.0, -0.5, 4.0])
    opening = replace(read_opening(backbone, final, (0,), prefixes), margin=margins)
    given = declined_prefix_margins(backbone, rows, opening)
    begun = []
    for row, token, margin, words in zip(rows, first, margins, given, strict=True):
        expected = margin[None]
        if margin > 0:
            prefix = prefixes[token == first[0]]
            begun.append(prefix)
            states = backbone.run_text([row], prefix)
            expected = prefix_margins(backbone, states, prefix, expected)
        torch.testing.assert_close(words, expected[0], atol=1e-4, rtol=0)
    assert set(begun) == set(prefixes)
    wordless = replace(opening, begun=[()] * len(rows))
    assert torch.equal(declined_prefix_margins(backbone, rows, wordless), margins)


def test_a_model_that_does_not_refuse_is_not_asked(guard: Guard) -> None:
    """It was fitted on random weights."""
    assert guard.policy.criterion(OwnRefusal) is None
    assert guard.policy.refusal_prefix == ()
