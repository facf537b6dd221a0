"""Each of the doctor's checks fails where what it checks is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_safeguard.doctor.doors import doors_shut
from vlm_safeguard.doctor.gate import closed_gate_identical
from vlm_safeguard.doctor.refusal import own_refusal_readable
from vlm_safeguard.doctor.requests import requests_end_where_answers_begin
from vlm_safeguard.doctor.restoring import restore_equals_two_passes
from vlm_safeguard.doctor.subject import Subject
from vlm_safeguard.doctor.text_answers import answers_from_the_text
from vlm_safeguard.doctor.text_view import text_only_view
from vlm_safeguard.engines.hooks import options
from vlm_safeguard.engines.hooks.attachment import Attachment
from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.model import ModelHooks
from vlm_safeguard.engines.hooks.text_answers import TextAnswers
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.gate import GATES, TextScore
from vlm_safeguard.policy.generation_prompt import GenerationPrompt, Place
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.text_view import TextView


@pytest.fixture
def subject(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> Subject:
    return Subject(model, processor, guard)


def fails(check: Callable[[Subject], str], subject: Subject, message: str) -> None:
    """A check fails, and this is what the user reads."""
    with pytest.raises(SafeguardError, match=message):
        check(subject)


# --- requests end where answers begin ---


def test_a_begun_answer_that_is_judged_is_noticed(subject: Subject, guard: Guard) -> None:
    assert "continue_final_message" in requests_end_where_answers_begin(subject)
    unaware = replace(subject, given=guard.variant(generation_prompt=None))
    fails(requests_end_where_answers_begin, unaware, "judged as a part of the request: text_tokens")


def test_scores_that_a_begun_answer_moves_are_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right number of tokens, but of other ones."""

    def judged(self: GenerationPrompt, text: list[int]) -> list[int]:
        place = self.place(text)
        assert place is not None
        return [*text[len(text) - place.stop : place.start], *text[place.start :]][-place.stop :]

    monkeypatch.setattr(GenerationPrompt, "judged", judged)
    fails(requests_end_where_answers_begin, subject, "part of the request: text_score")


def test_a_raw_prompt_that_is_answered_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = GenerationPrompt.place
    monkeypatch.setattr(
        GenerationPrompt,
        "place",
        lambda self, text: place(self, text) or Place("raw", len(text), len(text)),
    )
    fails(requests_end_where_answers_begin, subject, "without the chat template's")


# --- doors ---


def test_an_option_that_is_let_in_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass over a second prompt is refused, but too late."""
    assert "refused before a pass" in doors_shut(subject)
    monkeypatch.delitem(options.REFUSED, "guidance_scale")
    monkeypatch.setattr(options, "ALLOWED", options.ALLOWED | {"guidance_scale"})
    fails(doors_shut, subject, r"generate\(guidance_scale=2.0\) is refused, but only after a pass")


def test_embeddings_that_are_let_in_are_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three things refuse them, each of which would do."""

    def generate(self: Attachment, *args: Any, **given: Any) -> Any:
        if "inputs_embeds" in given:
            return self._inner_generate(*args, **given)
        raise SafeguardError

    monkeypatch.setattr(Attachment, "_generate", generate)
    assert doors_shut(subject)
    monkeypatch.setattr(ModelHooks, "_before_decoder", lambda self, module, args: None)
    fails(doors_shut, subject, "the decoder alone is answered")
    monkeypatch.setattr(ModelHooks, "put_on", lambda self: None)
    fails(doors_shut, subject, r"generate\(inputs_embeds=…\) is answered")


# --- gate and answers ---


def test_a_closed_gate_that_changes_something_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "bit for bit" in closed_gate_identical(subject)
    monkeypatch.setattr(TextScore, "opens", lambda self, score, window: score > -torch.inf)
    fails(closed_gate_identical, subject, "logits differ from the model's own")


def test_an_answer_to_another_text_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "bit for bit" in answers_from_the_text(subject)
    texts = cast("property", Batch.texts).fget
    assert texts is not None
    monkeypatch.setattr(Batch, "texts", property(lambda self: [text[5:] for text in texts(self)]))
    fails(answers_from_the_text, subject, "not the model's own to the text")


def test_an_answer_that_an_image_moves_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are answered with what is left of the image's own pass."""
    asked = TextAnswers.__call__

    def moved(self: TextAnswers, texts: Any, *args: Any) -> Any:
        shown = int(self._given["pixel_values"].abs().sum() * 1000) % 50
        return asked(self, [(*text[:-1], 50 + shown) for text in texts], *args[:2])

    monkeypatch.setattr(TextAnswers, "__call__", moved)
    fails(answers_from_the_text, subject, "another image gives another answer")


def test_an_edit_that_is_not_the_formula_s_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the edit moves them" in restore_equals_two_passes(subject)
    monkeypatch.setattr(
        "vlm_safeguard.engines.hooks.editing.edit_rows",
        lambda edit, hidden, V, index, at: hidden.clone(),
    )
    fails(restore_equals_two_passes, subject, "logits differ by")


def test_a_view_that_keeps_what_wraps_an_image_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned = TextView.aligned
    monkeypatch.setattr(
        TextView,
        "aligned",
        lambda self, row: (
            [*aligned(self, row)[0], row[-2]],
            [*aligned(self, row)[1], len(row) - 2],
        ),
    )
    fails(text_only_view, subject, "one image: the view has")


# --- own refusal ---


def test_what_the_gate_rests_on_is_named(
    subject: Subject, processor: LlavaProcessor, guard: Guard
) -> None:
    """Never a failure: a gate can do without the model's own refusal."""
    others = "text_score and image_score"
    assert own_refusal_readable(subject) == f"no; the gate rests on {others} alone"
    words = processor.tokenizer("I'm sorry", add_special_tokens=False)["input_ids"]
    own = OwnRefusal(tokens=(words[0],), slack=0.0, layers=guard.policy.layers)
    asking = guard.variant(gate=(own, *guard.policy.gate), refusal_prefix=tuple(words))
    assert own_refusal_readable(replace(subject, given=asking)) == (
        f"yes, by its first token ('I'); most begin \"I'm sorry\"; beside it {others}"
    )
    opened = replace(subject, given=guard.variant(gate=GATES["open"]))
    assert own_refusal_readable(opened) == "no; the gate rests on open alone"
