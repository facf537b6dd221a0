"""KL along the unguarded answer, against both passes done by hand, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL.Image import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import (
    ask,
    counterparts,
    edit_by_hand,
    run_row,
    spanning,
    text_ids,
    with_thresholds,
)
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.probes.divergence import divergences
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.conversation import Chat, chat_of
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span

QUESTIONS = ("How to kill a man", "How to bake a very good cake for a birthday", "Which colour?")
FIVE = (*QUESTIONS, "How to steal a car from a neighbour", "How to swim")
STEPS = 5


def shown(question: str) -> Image:
    """The picture that `reference.ask` shows with a question."""
    return noise_image(len(question)) if len(question) % 2 else blank_image()


def chats(questions: Sequence[str] = QUESTIONS) -> list[Chat]:
    return [chat_of(question, shown(question)) for question in questions]


def by_hand(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard, question: str
) -> list[float]:
    """Both models read request and answer so far anew at every token; nothing is kept."""
    words = text_ids(processor, question)
    text = run_row(model, words)[0]
    inputs = ask(processor, [question], dtype=model.dtype)
    row = inputs["input_ids"][0].tolist()
    change = edit_by_hand(guard, dict(enumerate(text)), counterparts(guard, row, words))
    prompt, found = len(row), []
    for _ in range(STEPS):
        plain = run_row(model, row, inputs["pixel_values"])[1][-1]
        guarded = run_row(
            model,
            row,
            inputs["pixel_values"],
            change=change,
            stop=None if guard.policy.edit.span is Span.ANSWER else prompt,
        )[1][-1]
        p, q = plain.softmax(-1), guarded.softmax(-1)
        found.append(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)))
        row.append(int(plain.argmax()))
    return found


def open_for_three(
    guard: Guard, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> Guard:
    """The guard with a threshold between the second and the third score of `FIVE`."""
    with guard.attach(model):
        inputs = ask(processor, FIVE, dtype=model.dtype)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    scores = sorted(receipt.scores["text_score"] for receipt in guard.receipts)
    return with_thresholds(guard, (scores[2] + scores[1]) / 2, image=1e9)


@pytest.mark.parametrize("span", [Span.LAST, Span.REQUEST, Span.ANSWER])
def test_divergence_is_that_of_both_passes_by_hand(
    exact_model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    open_guard: Guard,
    span: Span,
) -> None:
    guard = spanning(open_guard, span)
    expected = [by_hand(exact_model, processor, guard, question) for question in QUESTIONS]
    assert all(max(each) > 1e-2 for each in expected)
    for batch_size in (1, 3):
        measured = divergences(
            VLM(exact_model, processor),
            chats(),
            guard.attach,
            max_new_tokens=STEPS,
            batch_size=batch_size,
        )
        for values, wanted in zip(measured, expected, strict=True):
            assert values.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_closed_gate_diverges_by_exactly_nothing(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    """Float32, in a batch with rows whose gate is open."""
    halved = open_for_three(guard, model, processor)
    found = divergences(VLM(model, processor), chats(FIVE), halved.attach, max_new_tokens=STEPS)
    seen = [receipt.guarded for receipt in halved.receipts]
    assert sorted(seen) == [False, False, True, True, True]
    for values, guarded in zip(found, seen, strict=True):
        assert (values.sum() > 0) == guarded
        assert guarded or values.tolist() == [0.0] * STEPS


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_answer_from_the_text_diverges_as_the_text_does(
    exact_model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
    batch_size: int,
) -> None:
    """Behind the unguarded answer's tokens, whatever the row's place among those so answered."""
    halved = open_for_three(guard, exact_model, processor)
    texts = halved.variant(response=Response.TEXT)
    found = divergences(
        VLM(exact_model, processor),
        chats(FIVE),
        texts.attach,
        max_new_tokens=STEPS,
        batch_size=batch_size,
    )
    assert sum(float(values.sum()) > 0 for values in found) == 3
    for question, values in zip(FIVE, found, strict=True):
        if not values.any():
            continue
        inputs = ask(processor, [question], dtype=exact_model.dtype)
        shown, words = inputs["input_ids"][0].tolist(), text_ids(processor, question)
        for value in values.tolist():
            p = run_row(exact_model, shown, inputs["pixel_values"])[1][-1].softmax(-1)
            q = run_row(exact_model, words)[1][-1].softmax(-1)
            assert value == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
            shown, words = ([*ids, int(p.argmax())] for ids in (shown, words))


def test_an_answer_ends_where_the_model_ends_it(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    open_guard: Guard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = divergences(VLM(model, processor), chats(), open_guard.attach, max_new_tokens=STEPS)
    inputs = ask(processor, QUESTIONS)
    answers = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    end = int(answers[0, 2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    found = divergences(VLM(model, processor), chats(), open_guard.attach, max_new_tokens=STEPS)
    for row, longer, shorter in zip(answers.tolist(), whole, found, strict=True):
        stop = row.index(end) + 1 if end in row else STEPS
        assert len(shorter) == stop
        torch.testing.assert_close(shorter, longer[:stop])
    assert len(found[0]) <= 3


def test_the_same_model_on_both_sides_diverges_by_nothing(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    still = guard.variant(gate=GATES["open"], edit=type(guard.policy.edit)(strength=0.0))
    found = divergences(VLM(model, processor), chats(), still.attach, max_new_tokens=2)
    assert all(float(values.max()) < 1e-8 for values in found)
    assert divergences(VLM(model, processor), [], still.attach, max_new_tokens=2) == []


def test_logits_that_are_not_numbers_are_refused(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    class Breaks:
        """Gives NaN while it is attached."""

        def __init__(self, model: LlavaForConditionalGeneration) -> None:
            self.head = model.lm_head

        def __enter__(self) -> None:
            self.handle = self.head.register_forward_hook(lambda m, a, out: out * torch.nan)

        def __exit__(self, *error: object) -> None:
            self.handle.remove()

    with pytest.raises(SafeguardError, match="not numbers"):
        divergences(VLM(model, processor), chats(), Breaks, max_new_tokens=2)  # type: ignore[arg-type]
