"""Open requests answered from their texts: against the model asked without the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from support.observe import Watch
from support.reference import QUESTIONS, ask, small_guard, with_thresholds
from tiny import load_makers
from vlm_safeguard.engines.hooks.own_functions import ByPrompt
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.response import Response

Model = LlavaForConditionalGeneration
NEW = 6
PAD = 1


def scored(model: Model, processor: LlavaProcessor, guard: Guard, questions: Sequence[str]) -> Any:
    """Each question's score by its text, in the order given."""
    with guard.variant(gate=with_thresholds(guard, 1e9).policy.gate).attach(model) as attachment:
        told = attachment.generate(**ask(processor, questions), max_new_tokens=1).receipts
    return [receipt.scores["text_score"] for receipt in told]


@pytest.fixture
def halved(model: Model, processor: LlavaProcessor, guard: Guard) -> Guard:
    """Its gate opens for half of the questions, by their texts."""
    scores = sorted(scored(model, processor, guard, QUESTIONS))
    middle = (scores[1] + scores[2]) / 2
    return with_thresholds(guard, middle).variant(response=Response.TEXT)


def answers(model: Model, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """What was answered to each row, without what follows its end."""
    torch.manual_seed(0)
    out = model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return [row[inputs["input_ids"].shape[1] :].tolist() for row in out]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams and several answers": {"num_beams": 3, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "total length": {"max_new_tokens": None, "max_length": 60},
}


@pytest.mark.parametrize("way", WAYS)
def test_all_open_is_the_model_asked_without_images(
    model: Model, processor: LlavaProcessor, guard: Guard, way: str
) -> None:
    opened = guard.variant(gate=GATES["open"], response=Response.TEXT)
    inputs, plain = ask(processor, QUESTIONS), ask(processor, QUESTIONS, images=False)
    options = dict(WAYS[way])
    if way == "total length":
        options["max_length"] = inputs["input_ids"].shape[1] + NEW
        expected = answers(model, plain)
    else:
        expected = answers(model, plain, **options)
    with opened.attach(model):
        found = answers(model, inputs, **options)
    assert found == expected
    assert all(receipt.response is Response.TEXT for receipt in opened.receipts)
    assert {receipt.not_used for receipt in opened.receipts} == {"1 image"}
    assert {receipt.edit for receipt in opened.receipts} == {None}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "total length"])
def test_closed_rows_are_those_without_a_guard_and_open_ones_those_without_images(
    model: Model, processor: LlavaProcessor, halved: Guard, way: str
) -> None:
    inputs = ask(processor, QUESTIONS)
    free = answers(model, inputs, **WAYS[way])
    with halved.attach(model):
        found = answers(model, inputs, **WAYS[way])
    copies = len(found) // len(QUESTIONS)
    receipts = halved.receipts[:: len(halved.receipts) // len(QUESTIONS)]
    is_open = [receipt.guarded for receipt in receipts]
    assert sum(is_open) == 2
    asked = [question for question, x in zip(QUESTIONS, is_open, strict=True) if x]
    texts = iter(answers(model, ask(processor, asked, images=False), **WAYS[way]))
    for row, answer in enumerate(found):
        if is_open[row // copies]:
            wanted = next(texts)
            assert answer[: len(wanted)] == wanted
            assert set(answer[len(wanted) :]) <= {PAD}
        else:
            assert answer == free[row]


def test_an_open_answer_is_the_same_whatever_the_image_shows(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    """Pixels of every size, sampling included."""
    inputs = ask(processor, QUESTIONS)
    found = []
    for scale in (1.0, -3.0, 1e3):
        moved = {**inputs, "pixel_values": inputs["pixel_values"] * scale}
        with halved.attach(model):
            out = answers(model, moved, do_sample=True)
        found.append([row for row, told in zip(out, halved.receipts, strict=True) if told.guarded])
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_returned_dict_is_put_together(
    model: Model, processor: LlavaProcessor, halved: Guard, beams: int
) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "num_beams": beams,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    inputs = ask(processor, QUESTIONS)
    free = model.generate(**inputs, **options)
    with halved.attach(model):
        out = model.generate(**inputs, **options)
    is_open = [receipt.guarded for receipt in halved.receipts[::beams]]
    asked = [question for question, x in zip(QUESTIONS, is_open, strict=True) if x]
    texts = model.generate(**ask(processor, asked, images=False), **options)
    assert type(out) is type(free)
    place = 0
    for row, opened in enumerate(is_open):
        source, at = (texts, place) if opened else (free, row)
        place += opened
        mine, theirs = slice(row * beams, (row + 1) * beams), slice(at * beams, (at + 1) * beams)
        for name in ("scores", "logits"):
            for left, right in zip(getattr(out, name), getattr(source, name), strict=False):
                if opened:  # goes on from the pass that read the text, padded to another width
                    torch.testing.assert_close(left[mine], right[theirs], rtol=1e-4, atol=1e-5)
                else:
                    assert torch.equal(left[mine], right[theirs])
        if beams > 1:
            assert out.sequences_scores[row] == source.sequences_scores[at]
            kept = source.beam_indices[at]
            moved = torch.where(kept < 0, kept, kept - at * beams + row * beams)
            assert torch.equal(out.beam_indices[row][: len(moved)], moved)
    assert out.past_key_values is None
    transition_scores: Any = model.compute_transition_scores
    kept = out.beam_indices if beams > 1 else None
    assert len(transition_scores(out.sequences, out.scores, kept)) == len(QUESTIONS)


def test_the_callers_functions_see_the_prompts_that_they_gave(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    opened = guard.variant(gate=GATES["open"], response=Response.TEXT)
    inputs = ask(processor, QUESTIONS[:2])
    prompt = inputs["input_ids"]
    seen: list[Tensor] = []

    class Looks(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids)
            return scores

    class Stops(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
            seen.append(input_ids)
            return torch.full((len(input_ids),), input_ids.shape[1] >= prompt.shape[1] + 3)

    def allowed(row: int, ids: Tensor) -> list[int]:
        assert torch.equal(ids[: prompt.shape[1]], prompt[row])
        return [20 + row, 30 + row]

    with opened.attach(model):
        found = answers(
            model,
            inputs,
            logits_processor=LogitsProcessorList([Looks()]),
            stopping_criteria=StoppingCriteriaList([Stops()]),
            prefix_allowed_tokens_fn=allowed,
        )
    assert all(torch.equal(ids[:, : prompt.shape[1]], prompt) for ids in seen)
    assert [len(row) for row in found] == [3, 3]
    assert all(set(row) <= {20 + n, 30 + n} for n, row in enumerate(found))


def test_a_streamer_gets_the_prompt_and_then_the_answer(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    prefix = (20, 21, 22)
    for response, begun in ((Response.TEXT, ()), (Response.REFUSAL, prefix)):
        opened = guard.variant(gate=GATES["open"], response=response, refusal_prefix=prefix)
        streamer: Any = Watch()
        inputs = ask(processor, QUESTIONS[:1])
        with opened.attach(model):
            (found,) = answers(model, inputs, streamer=streamer)
        assert streamer.streamed == found
        assert tuple(found[: len(begun)]) == begun
        assert len(found) == NEW


@pytest.mark.parametrize("looks", [-1e6, 1e6])
def test_a_streamer_gets_the_prompt_once_where_the_image_may_open_the_gate(
    model: Model, processor: LlavaProcessor, guard: Guard, looks: float
) -> None:
    placed = with_thresholds(guard, 1e9, image=looks).variant(response=Response.TEXT)
    streamer, inputs = Keeps(), ask(processor, QUESTIONS[:1])
    with placed.attach(model):
        (found,) = answers(model, inputs, streamer=streamer)
        assert placed.receipts[0].guarded == (looks < 0)
    assert streamer.given == [inputs["input_ids"].tolist(), *([token] for token in found)]


class Keeps(BaseStreamer):
    """What it is given, each time."""

    def __init__(self) -> None:
        self.given: list[list[Any]] = []

    def put(self, value: Tensor) -> None:
        """A prompt or a token."""
        self.given.append(value.tolist())

    def end(self) -> None:
        """Nothing is kept back."""


def test_no_token_of_several_requests_is_streamed_where_one_is_answered_from_its_text(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    """Beside the images the model would have said something else to it."""
    streamer, inputs = Keeps(), ask(processor, QUESTIONS)
    with halved.attach(model), pytest.raises(SafeguardError, match="one request at a time"):
        answers(model, inputs, streamer=streamer)
    assert streamer.given == []
    closed = halved.variant(gate=with_thresholds(halved, 1e9).policy.gate)
    with closed.attach(model):
        found = answers(model, inputs, streamer=streamer)
    assert streamer.given[1:] == [list(each) for each in zip(*found, strict=True)]


def test_no_new_tokens_are_the_library_s_own_error(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    opened = guard.variant(gate=GATES["open"], response=Response.TEXT)
    with opened.attach(model), pytest.raises(ValueError, match="max_new_tokens"):
        answers(model, ask(processor, QUESTIONS), max_new_tokens=0)


def test_the_tokens_that_answers_begin_with_are_weighed_once(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """For the model's own decision and for the answer."""
    own = OwnRefusal(tokens=(20,), slack=0.0, layers=guard.policy.layers[:1])
    gate = (own, *with_thresholds(guard, -1e9).policy.gate)
    opened = guard.variant(gate=gate, response=Response.TEXT)
    rows: list[int] = []
    with opened.attach(model):
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        answers(model, ask(processor, QUESTIONS), max_new_tokens=1)
        hook.remove()
    assert rows == [len(QUESTIONS)]
    assert all(receipt.guarded for receipt in opened.receipts)


def test_a_refusal_begins_with_the_models_own_words_where_it_would_answer(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    prefix = (20, 21, 22)
    opened = guard.variant(gate=GATES["open"], response=Response.REFUSAL, refusal_prefix=prefix)
    inputs, plain = ask(processor, QUESTIONS), ask(processor, QUESTIONS, images=False)
    with opened.attach(model):
        found = answers(model, inputs)
    for name in plain:
        behind = torch.tensor(prefix) if name == "input_ids" else torch.ones(3).long()
        plain[name] = torch.cat([plain[name], behind.expand(len(QUESTIONS), -1)], dim=1)
    rest = answers(model, plain, max_new_tokens=NEW - len(prefix))
    assert found == [[*prefix, *row] for row in rest]
    with opened.attach(model):
        assert answers(model, inputs, max_new_tokens=2) == [
            [20, row[0]]
            for row in answers(model, {n: x[:, :-2] for n, x in plain.items()}, max_new_tokens=1)
        ]


@pytest.mark.parametrize("response", [Response.TEXT, Response.REFUSAL])
def test_a_text_whose_tokens_attend_both_ways_is_answered_as_the_processor_writes_it(
    response: Response,
) -> None:
    """PaliGemma's; what a refusal begins with is the answer's and attends to earlier tokens."""
    model: Any
    model, processor = load_makers()["paligemma"]()
    model = model.double()
    words = processor.tokenizer("I'm", add_special_tokens=False)["input_ids"]
    begun = words if response is Response.REFUSAL else []
    guard = small_guard(model, processor).variant(response=response, refusal_prefix=tuple(words))
    opened = with_thresholds(guard, -1e9)
    questions = ["Why?", "How is bread made?"]
    for gate in (opened.policy.gate, GATES["open"]):
        shown = model_inputs(model, processor, questions, [noise_image(0), noise_image(1)])
        with guard.variant(gate=gate).attach(model):
            rows = answers(model, {**shown})
        for question, row in zip(questions, rows, strict=True):
            text = model_inputs(model, processor, [question], [None])
            behind = torch.tensor([begun], dtype=torch.long)
            whole = {
                "input_ids": torch.cat([text["input_ids"], behind], 1),
                "attention_mask": torch.cat([text["attention_mask"], torch.ones_like(behind)], 1),
                "token_type_ids": torch.cat([text["token_type_ids"], torch.ones_like(behind)], 1),
            }
            assert row == [*begun, *answers(model, whole, max_new_tokens=NEW - len(begun))[0]]


def test_harm_in_the_image_leads_to_the_text_too(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """The multimodal pass opens the gate; what it would have said is not said."""
    inputs, plain = ask(processor, QUESTIONS), ask(processor, QUESTIONS, images=False)
    for looks in (-1e6, 0.0):
        placed = with_thresholds(guard, 1e9, image=looks).variant(response=Response.TEXT)
        with placed.attach(model):
            found = answers(model, inputs)
        is_open = [receipt.guarded for receipt in placed.receipts]
        assert any(is_open)
        free, texts = answers(model, inputs), answers(model, plain)
        asked = [question for question, x in zip(QUESTIONS, is_open, strict=True) if x]
        alone = iter(answers(model, ask(processor, asked, images=False)))
        for row, opened in enumerate(is_open):
            assert found[row] == (next(alone) if opened else free[row])
        assert texts


def test_what_cannot_be_answered_from_the_text_is_refused(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    inputs = ask(processor, QUESTIONS)
    with halved.attach(model):
        with pytest.raises(SafeguardError, match="a plain forward cannot answer"):
            model(**inputs)
        with pytest.raises(SafeguardError, match="output_hidden_states"):
            answers(model, inputs, output_hidden_states=True, return_dict_in_generate=True)
        with pytest.raises(SafeguardError, match="attention_mask"):
            answers(model, {n: x for n, x in inputs.items() if n != "attention_mask"})


def test_options_by_position_are_looked_at_too(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    inputs = ask(processor, QUESTIONS)
    config = GenerationConfig(max_new_tokens=NEW, dola_layers="low")
    with halved.attach(model), pytest.raises(SafeguardError, match="dola_layers"):
        model.generate(inputs["input_ids"], config, pixel_values=inputs["pixel_values"])


def test_text_without_images_is_let_through(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    opened = guard.variant(gate=GATES["open"], response=Response.REFUSAL)
    plain = ask(processor, QUESTIONS, images=False)
    free = answers(model, plain)
    with opened.attach(model):
        assert answers(model, plain) == free
    assert not any(receipt.guarded for receipt in opened.receipts)


@pytest.mark.parametrize("response", [Response.EDIT, Response.TEXT])
def test_criteria_by_prompt_see_the_answers_that_are_given(
    model: Model, processor: LlavaProcessor, halved: Guard, response: Response
) -> None:
    """Whichever run they come from, step by step, with the receipts of the whole batch."""
    seen: dict[int, list[list[int]]] = {}
    inputs = ask(processor, QUESTIONS)
    width = inputs["input_ids"].shape[1]
    guard = halved.variant(response=response)

    class Looks(ByPrompt):
        def ends(self, ids: Tensor, prompts: Sequence[int]) -> Tensor:
            assert torch.equal(ids[:, :width], inputs["input_ids"][list(prompts)])
            for prompt, row in zip(prompts, ids[:, width:].tolist(), strict=True):
                seen.setdefault(prompt, []).append(row)
            assert len(guard.receipts) == len(QUESTIONS)
            assert {receipt.images for receipt in guard.receipts} == {1}
            return torch.full((len(ids),), ids.shape[1] == width + 4)

    with guard.attach(model):
        whole = answers(model, inputs)
        cut = answers(model, inputs, stopping_criteria=StoppingCriteriaList([Looks()]))
    assert cut == [row[:4] for row in whole]
    for prompt, steps in seen.items():
        assert steps == [whole[prompt][: n + 1] for n in range(4)]
    assert seen.keys() == set(range(len(QUESTIONS)))
