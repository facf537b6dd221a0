"""The contracts of a guard at work: what it must do, and what it must never do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaProcessor,
)
from transformers.generation.streamers import BaseStreamer

from support.observe import Model, answer, hooks, positions, step
from support.reference import (
    QUESTIONS,
    ask,
    centred,
    edit_by_hand,
    guarded_by_hand,
    opened_by_hand,
    run_row,
    same_receipt,
    spanning,
    text_ids,
    with_thresholds,
)
from support.turns import in_turns
from tiny.pocket import make_model
from vlm_safeguard.anchors import shipped_anchors
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.cache import CACHE_NAMES, cache_in
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.policy.edits import Add, Drift, Edit, Project, Refuse, Restore
from vlm_safeguard.policy.gate import GATES, TextScore
from vlm_safeguard.policy.span import Span

pytestmark = pytest.mark.versions

EDITS = {
    "restore": Restore(),
    "two-sided": Restore(one_sided=False),
    "refuse": Refuse(),
    "project": Project(),
    "drift": Drift(),
    "add": Add(),
    "flipped": Refuse(-0.5),
    "restore, last": Restore(span=Span.LAST),
    "refuse, last": Refuse(span=Span.LAST),
    "project, request": Project(span=Span.OPENING),
    "add, request": Add(span=Span.OPENING),
}
edits = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
IMAGE = 4  # the token that stands for an image's patches
CLOSED = 1e9  # a threshold that no score passes


def new_tokens(out: Any, inputs: dict[str, Tensor]) -> Tensor:
    sequences: Tensor = out.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


def exact(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def text_scores(model: Model, guard: Guard, inputs: dict[str, Tensor]) -> list[float]:
    with guard.attach(model), torch.no_grad():
        model(**inputs)
    scores = [receipt.scores.get("text_score") for receipt in guard.receipts]
    return [score for score in scores if score is not None]


def half_open(model: Model, guard: Guard, inputs: dict[str, Tensor]) -> tuple[Guard, list[bool]]:
    """The guard with a text threshold between the rows' scores, and which rows it opens."""
    scores = text_scores(model, guard, inputs)
    ranked = sorted(scores)
    middle = len(ranked) // 2
    threshold = (ranked[middle - 1] + ranked[middle]) / 2
    return with_thresholds(guard, threshold, image=CLOSED), [score > threshold for score in scores]


# --- 1. closed gate, identical output ---


@pytest.mark.parametrize(("edit", "side"), in_turns(EDITS, ["left", "right"]))
def test_closed_rows_of_a_mixed_batch_have_identical_logits(
    model: Model, processor: LlavaProcessor, guard: Guard, edit: Edit, side: str
) -> None:
    inputs = ask(processor, QUESTIONS, side=side)
    mixed, is_open = half_open(model, guard.variant(edit=edit), inputs)
    assert sorted(is_open) == [False, False, True, True]
    with torch.no_grad():
        free = model(**inputs).logits
        with mixed.attach(model):
            guarded = model(**inputs).logits
    for row, opened in enumerate(is_open):
        assert torch.equal(guarded[row], free[row]) != opened
        assert mixed.receipts[row].guarded == opened


@edits
def test_closed_rows_of_a_mixed_batch_have_identical_answers(
    model: Model, processor: LlavaProcessor, guard: Guard, edit: Edit
) -> None:
    inputs = ask(processor, QUESTIONS)
    mixed, is_open = half_open(model, guard.variant(edit=edit), inputs)
    free = answer(model, inputs)
    with mixed.attach(model):
        guarded = answer(model, inputs)
    for row, opened in enumerate(is_open):
        same = [
            torch.equal(a[row], b[row]) for a, b in zip(free.logits, guarded.logits, strict=True)
        ]
        assert not any(same) if opened else all(same)
        if not opened:
            assert torch.equal(free.sequences[row], guarded.sequences[row])


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_closed_row_alone_has_an_identical_answer(
    model: Model, processor: LlavaProcessor, guard: Guard, question: str
) -> None:
    inputs = ask(processor, [question])
    score = text_scores(model, guard, inputs)[0]
    for threshold, opened in ((score + 0.01, False), (score - 0.01, True)):
        placed = with_thresholds(guard, threshold, image=CLOSED)
        free = answer(model, inputs)
        with placed.attach(model):
            guarded = answer(model, inputs)
        equal = all(map(torch.equal, free.logits, guarded.logits))
        assert equal != opened
        if not opened:
            assert torch.equal(free.sequences, guarded.sequences)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_request_without_an_image_is_left_to_the_model(
    model: Model, processor: LlavaProcessor, guard: Guard, question: str
) -> None:
    inputs = ask(processor, [question], images=False)
    free = answer(model, inputs)
    with guard.attach(model):
        guarded = answer(model, inputs)
    assert all(map(torch.equal, free.logits, guarded.logits))
    assert torch.equal(free.sequences, guarded.sequences)
    (receipt,) = guard.receipts
    assert not receipt.guarded
    assert "no image" in receipt.reason


def test_papers_gate_closes_single_layers(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    paper = guard.variant(layers=tuple(range(6)), gate=GATES["paper"], edit=Project())
    inputs = ask(processor, QUESTIONS)
    free = answer(model, inputs)
    with paper.attach(model):
        guarded = answer(model, inputs)
    counts = []
    for row, (question, receipt) in enumerate(zip(QUESTIONS, paper.receipts, strict=True)):
        states, _ = run_row(model, text_ids(processor, question))
        expected = tuple(
            layer
            for layer in range(6)
            if float((states[layer][-1] * guard.policy.directions.vectors[layer, 0]).sum()) > 0
        )
        assert receipt.layers == expected
        same = all(
            torch.equal(a[row], b[row]) for a, b in zip(free.logits, guarded.logits, strict=True)
        )
        assert same == (not expected)
        counts.append(len(expected))
    assert 0 < sum(counts) < 6 * len(QUESTIONS)


# --- 2. fail closed (faults are in test_faults; here is what callers do) ---


def hooked(model: Model) -> dict[str, int]:
    return {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_layers_are_hooked_in_passes_that_need_it_and_in_the_language_model_only(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """The prefill of an open row needs it; decoding while an opening is said, or where all
    of the answer is edited; a closed row not, whatever it says.

    Text-only passes do not reach the head, so what is seen there are the model's own passes.
    """
    inputs = ask(processor, QUESTIONS[:1])
    seen: list[set[str]] = []

    def look(*_: Any) -> None:
        after = hooked(model)
        seen.append({name for name in before if after[name] != before[name]} - {"", "lm_head"})

    before = hooked(model)
    handle = model.lm_head.register_forward_hook(look)
    layers = {f"model.language_model.layers.{n}" for n in (2, 4)}
    said, prompt = (17, 23, 31), inputs["input_ids"].shape[1]
    for threshold, span, prefix, expected in (
        (-CLOSED, Span.ANSWER, (), [layers, layers, layers]),
        (-CLOSED, Span.OPENING, (), [layers, set(), set()]),
        (-CLOSED, Span.REQUEST, said, [layers, set(), set()]),
        (-CLOSED, Span.LAST, said, [layers, set(), set()]),
        (-CLOSED, Span.OPENING, said[:1], [layers, layers, set()]),
        (-CLOSED, Span.OPENING, said, [layers, layers, layers]),
        (-CLOSED, Span.OPENING, (said[0], 5, said[2]), [layers, layers, set()]),
        (CLOSED, Span.ANSWER, (), [set(), set(), set()]),
        (CLOSED, Span.OPENING, said, [set(), set(), set()]),
    ):
        gated = with_thresholds(guard, threshold).variant(layers=(2, 4), refusal_prefix=prefix)
        watched = spanning(gated, span)
        with watched.attach(model):
            seen.clear()
            model.generate(
                **inputs,
                max_new_tokens=3,
                prefix_allowed_tokens_fn=lambda _, ids: [said[len(ids) - prompt]],
            )
        assert seen == expected
    handle.remove()
    assert hooked(model) == before


def test_a_closed_rows_refusal_does_not_hook_layers(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """Not beside an open row either, whose answer is none."""
    inputs = ask(processor, QUESTIONS)
    mixed, is_open = half_open(
        model, spanning(guard, Span.OPENING, refusal_prefix=(17, 23)), inputs
    )
    before, before_in_it = hooked(model), hooked(model.model)
    seen: list[bool] = []
    handle = model.lm_head.register_forward_hook(
        lambda *_: seen.append(hooked(model.model) != before_in_it)
    )
    prompt = inputs["input_ids"].shape[1]
    with mixed.attach(model):
        seen.clear()
        model.generate(
            **inputs,
            max_new_tokens=3,
            prefix_allowed_tokens_fn=lambda row, ids: [
                6 if is_open[row] else (17, 23, 5)[len(ids) - prompt]
            ],
        )
    handle.remove()
    assert seen == [True, False, False]
    assert hooked(model) == before


def test_inputs_embeds_are_refused(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    ids = ask(processor, QUESTIONS[:1], images=False)["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    with open_guard.attach(model):
        with pytest.raises(SafeguardError, match="inputs_embeds"):
            model(inputs_embeds=embeds)
        with pytest.raises(SafeguardError, match="inputs_embeds"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_parts_of_a_guarded_model_cannot_be_called(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    with open_guard.attach(model), torch.no_grad():
        with pytest.raises(SafeguardError, match="outside the guarded model"):
            model.model(**inputs)
        with pytest.raises(SafeguardError, match="outside the guarded model"):
            model.model.language_model(input_ids=torch.tensor([[5, 6]]))
        model(**inputs)


def test_doors_that_are_not_guarded_are_shut(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    ids = inputs["input_ids"]
    with open_guard.attach(model):
        with pytest.raises(SafeguardError, match="Continuous batching"):
            model.generate_batch([ids[0].tolist()])
        with pytest.raises(SafeguardError, match="decoding loop of your own"):
            model.generate(**inputs, custom_generate="someone/loop")
        with pytest.raises(SafeguardError, match="a part of the guarded model"):
            model.generate(**inputs, assistant_early_exit=2)
        with pytest.raises(SafeguardError, match="inputs_embeds"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(SafeguardError, match="without input_ids"):
            model.generate(max_new_tokens=1)
    assert not {"generate", "generate_batch"} & set(vars(model))


def test_generate_refuses_right_padding(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS, side="right")
    with open_guard.attach(model), pytest.raises(SafeguardError, match="Pad on the left"):
        model.generate(**inputs, max_new_tokens=1)


def test_a_cache_of_other_tokens_is_refused_by_generate(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad(), open_guard.attach(model):
        whole = model(**inputs, use_cache=True).past_key_values
        with pytest.raises((SafeguardError, IndexError, RuntimeError, ValueError)):
            model.generate(input_ids=ids, attention_mask=mask, past_key_values=whole)
        longer = torch.cat([mask, torch.ones(1, 3).long()], dim=1)
        with pytest.raises(SafeguardError, match="whole conversation's tokens"):
            # only the new tokens: what the cache holds before them is not known
            model.generate(
                input_ids=torch.full((1, 3), 7),
                attention_mask=longer,
                past_key_values=whole,
                max_new_tokens=1,
            )
        whole.crop(-1)
        swap = model.register_forward_pre_hook(
            lambda m, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"] + 1}),
            prepend=True,
            with_kwargs=True,
        )
        with pytest.raises(SafeguardError, match="other tokens than the prompt"):
            model.generate(**inputs, past_key_values=whole, max_new_tokens=1)
        swap.remove()


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_seen_by_either_name(
    model: Model, processor: LlavaProcessor, open_guard: Guard, name: str
) -> None:
    """One that was filled without the guard is no new request, whatever transformers calls it."""
    with torch.no_grad():
        foreign = cache_in(model(**ask(processor, QUESTIONS[:1]), use_cache=True))
        assert foreign is not None
        with (
            open_guard.attach(model),
            pytest.raises(SafeguardError, match="not filled under this guard"),
        ):
            model(input_ids=torch.tensor([[7]]), **{name: foreign})


def test_positional_arguments_count(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS, side="right")
    with open_guard.attach(model), torch.no_grad():
        named = model(**inputs).logits
        by_place = model(
            inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
        ).logits
    assert torch.equal(named, by_place)


# --- 3. order and batch do not matter ---


@edits
def test_a_row_does_not_depend_on_its_batch(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, edit: Edit
) -> None:
    """Float64, left padding: tokens equal, logits to 1e-10."""
    guard = open_guard.variant(edit=edit)
    inputs = ask(processor, QUESTIONS, dtype=torch.float64)
    order = [2, 0, 3, 1]
    with guard.attach(exact_model):
        batch = answer(exact_model, inputs)
        receipts = guard.receipts
        turned = answer(exact_model, {name: value[order] for name, value in inputs.items()})
        turned_receipts = guard.receipts
        for row, question in enumerate(QUESTIONS):
            alone_inputs = ask(processor, [question], dtype=torch.float64)
            alone = answer(exact_model, alone_inputs)
            there = order.index(row)
            for logits in zip(batch.logits, alone.logits, turned.logits, strict=True):
                exact(logits[0][row], logits[1][0])
                exact(logits[0][row], logits[2][there])
            assert torch.equal(new_tokens(batch, inputs)[row], new_tokens(alone, alone_inputs)[0])
            for other in (guard.receipts[0], turned_receipts[there]):
                same_receipt(receipts[row], other)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter_in_a_plain_forward(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, side: str
) -> None:
    """Float64: every real token's logits to 1e-10."""
    inputs = ask(processor, QUESTIONS, side=side, dtype=torch.float64)
    mask = inputs["attention_mask"]
    assert (mask == 0).any()
    with open_guard.attach(exact_model), torch.no_grad():
        batch = exact_model(**inputs, position_ids=positions(mask)).logits
        for row, question in enumerate(QUESTIONS):
            alone = exact_model(**ask(processor, [question], dtype=torch.float64)).logits[0]
            exact(batch[row][mask[row].bool()], alone)


def test_decoding_goes_on_after_right_padding(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    """Rows of a right-padded batch go on from their own last token, held edit and all."""
    inputs = ask(processor, QUESTIONS, side="right", dtype=torch.float64)
    mask = inputs["attention_mask"]
    lengths = mask.sum(1)
    with open_guard.attach(exact_model), torch.no_grad():
        out = exact_model(**inputs, use_cache=True)
        first = out.logits[torch.arange(len(mask)), lengths - 1].argmax(-1)
        longer = torch.cat([mask, torch.ones(len(mask), 1).long()], dim=1)
        out = exact_model(
            input_ids=first[:, None],
            attention_mask=longer,
            position_ids=lengths[:, None],
            past_key_values=out.past_key_values,
        )
    for row, question in enumerate(QUESTIONS):
        tokens, logits = guarded_by_hand(exact_model, processor, open_guard, question, steps=2)
        assert int(first[row]) == tokens[0]
        exact(out.logits[row, -1], logits[1])


def test_closed_and_open_rows_do_not_mix(
    exact_model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS, images=[True, False, True, False], dtype=torch.float64)
    restore = guard.variant(gate=GATES["open"], edit=Restore())
    with restore.attach(exact_model):
        batch = answer(exact_model, inputs)
        for row, question in enumerate(QUESTIONS):
            alone = answer(
                exact_model, ask(processor, [question], images=row % 2 == 0, dtype=torch.float64)
            )
            for many, one in zip(batch.logits, alone.logits, strict=True):
                exact(many[row], one[0])


@pytest.mark.parametrize("kind", ["open", "half open"])
def test_beam_search_on_a_batch_equals_row_by_row(
    exact_model: Model, processor: LlavaProcessor, guard: Guard, open_guard: Guard, kind: str
) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    inputs = ask(processor, QUESTIONS, dtype=torch.float64)
    chosen = open_guard if kind == "open" else half_open(exact_model, guard, inputs)[0]
    free = answer(exact_model, inputs, **options)
    with chosen.attach(exact_model):
        batch = answer(exact_model, inputs, **options, output_scores=True)
        guarded = [receipt.guarded for receipt in chosen.receipts]
        assert len(guarded) == 3 * len(QUESTIONS)
        for row, question in enumerate(QUESTIONS):
            alone_inputs = ask(processor, [question], dtype=torch.float64)
            alone = answer(exact_model, alone_inputs, **options, output_scores=True)
            mine = slice(2 * row, 2 * row + 2)
            assert torch.equal(new_tokens(batch, inputs)[mine], new_tokens(alone, alone_inputs))
            torch.testing.assert_close(
                batch.sequences_scores[mine], alone.sequences_scores, rtol=1e-5, atol=1e-5
            )
            if not guarded[3 * row]:
                assert torch.equal(batch.sequences[mine], free.sequences[mine])
    assert not torch.equal(batch.sequences, free.sequences)


# --- 4. nothing leaks ---


@pytest.fixture
def untouched(model: Model, processor: LlavaProcessor) -> Iterator[Callable[[], None]]:
    """A check, also made at the end, that hooks and outputs are what they were at the start."""
    inputs = ask(processor, QUESTIONS)
    free = answer(model, inputs)  # transformers sets hooks of its own on first use
    before, weights = hooks(model), {k: v.clone() for k, v in model.state_dict().items()}

    def check() -> None:
        assert hooks(model) == before
        after = answer(model, inputs)
        assert torch.equal(after.sequences, free.sequences)
        assert all(map(torch.equal, after.logits, free.logits))
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())

    yield check
    check()


def test_leaving_restores_the_model(
    model: Model, processor: LlavaProcessor, open_guard: Guard, untouched: Callable[[], None]
) -> None:
    inputs = ask(processor, QUESTIONS)
    before = hooks(model)
    with open_guard.attach(model):
        assert hooks(model) != before
        first = answer(model, inputs)
    untouched()
    with open_guard.attach(model):  # and again
        second = answer(model, inputs)
    assert all(map(torch.equal, first.logits, second.logits))


def test_an_attachment_is_not_reentrant_but_can_be_used_again(
    model: Model, processor: LlavaProcessor, open_guard: Guard, untouched: Callable[[], None]
) -> None:
    inputs = ask(processor, QUESTIONS)
    attachment = open_guard.attach(model)
    with attachment:
        expected = answer(model, inputs)
        with pytest.raises(SafeguardError, match="already in use"):
            attachment.__enter__()
        assert all(map(torch.equal, answer(model, inputs).logits, expected.logits))
    untouched()
    with attachment:
        assert all(map(torch.equal, answer(model, inputs).logits, expected.logits))


def test_one_guard_on_two_models(
    model: Model, processor: LlavaProcessor, open_guard: Guard, untouched: Callable[[], None]
) -> None:
    twin, inputs = make_model(processor), ask(processor, QUESTIONS)
    with open_guard.attach(model):
        expected = answer(model, inputs)
        with open_guard.attach(twin):
            for one in (twin, model, twin):
                out = answer(one, inputs)
                assert all(map(torch.equal, out.logits, expected.logits))
                assert len(open_guard.receipts) == len(QUESTIONS)
        free = answer(twin, inputs)
        assert all(map(torch.equal, answer(model, inputs).logits, expected.logits))
    assert all(map(torch.equal, answer(model, inputs).logits, free.logits))


def test_requests_may_take_turns(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    """Two answers written in turns, each with its cache, are those written one after the other."""
    asked = [ask(processor, [question]) for question in QUESTIONS[:2]]

    def start(inputs: dict[str, Tensor]) -> Any:
        return model(**inputs, use_cache=True)

    with open_guard.attach(model), torch.no_grad():
        apart = [step(model, start(inputs), inputs["attention_mask"]).logits for inputs in asked]
        outs = [start(inputs) for inputs in asked]
        turns = [
            step(model, out, inputs["attention_mask"]).logits
            for out, inputs in zip(outs, asked, strict=True)
        ]
    assert all(map(torch.equal, apart, turns))


# --- 5. idempotent ---


@pytest.mark.parametrize("one_sided", [True, False])
def test_restore_changes_nothing_without_an_image(
    model: Model, processor: LlavaProcessor, open_guard: Guard, one_sided: bool
) -> None:
    restore = open_guard.variant(edit=Restore(one_sided=one_sided))
    for images in ([False] * 4, [True, False, False, True]):
        inputs = ask(processor, QUESTIONS, images=images)
        free = answer(model, inputs)
        with restore.attach(model):
            guarded = answer(model, inputs)
        for row, has in enumerate(images):
            for a, b in zip(free.logits, guarded.logits, strict=True):
                assert torch.equal(a[row], b[row]) != has
            assert restore.receipts[row].guarded == has


def test_two_sided_restore_equals_the_text_only_coordinates(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    """However many layers are edited, the coordinates after each are the text's: no compounding."""
    restore = open_guard.variant(edit=Restore(one_sided=False))
    inputs = ask(processor, QUESTIONS[:1], dtype=torch.float64)
    text, _ = run_row(exact_model, text_ids(processor, QUESTIONS[0]))
    behind = behind_the_image(inputs)
    with restore.attach(exact_model):
        seen = states_of(exact_model, inputs)
    for layer in restore.policy.layers:
        V = restore.policy.directions.vectors[layer, : restore.policy.rank].double()
        # V is orthonormal to float32 only.
        for place in range(-behind, 0):
            torch.testing.assert_close(
                V @ seen[layer][place], V @ text[layer][place], rtol=1e-5, atol=1e-5
            )


def behind_the_image(inputs: dict[str, Tensor]) -> int:
    """Tokens behind the image in the only row."""
    return inputs["input_ids"][0].tolist()[::-1].index(IMAGE)


def states_of(model: Model, inputs: dict[str, Any]) -> list[Tensor]:
    """The (tokens, hidden) states of the only row after each layer, of a plain forward."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: seen.append(out[0].clone()))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen[-len(handles) :]  # the text-only pass comes first


@pytest.mark.parametrize("edit", [Restore(one_sided=False), Restore(), Refuse()])
def test_text_between_images_is_edited_towards_its_own_counterparts(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, edit: Edit
) -> None:
    """Against the places written out: text, image, text, image, text. Float64 to 1e-10."""
    guard = open_guard.variant(edit=edit)
    ended = " a man now<|im_end|>\n<|im_start|>assistant\n"
    parts = ["<|im_start|>user\nLook at ", "How to kill", ended]
    start, middle, end = (
        processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts
    )
    row = [*start, *[IMAGE] * 4, *middle, *[IMAGE] * 4, *end]
    first, second = len(start), len(start) + 4 + len(middle)
    spanned = {first + 4 + i: first + i for i in range(len(middle))}
    spanned |= {second + 4 + i: first + len(middle) + i for i in range(len(end))}
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    inputs = {"input_ids": torch.tensor([row]), "pixel_values": pictures}

    free = states_of(exact_model, inputs)
    text, _ = run_row(exact_model, [*start, *middle, *end])
    by_hand = edit_by_hand(guard, dict(enumerate(text)), spanned)
    expected, _ = run_row(exact_model, row, pictures, change=by_hand)
    with guard.attach(exact_model):
        found = states_of(exact_model, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        exact(mine, theirs)
    untouched = [place for place in range(len(row)) if place not in spanned]
    assert [row[place] for place in untouched] == [*start, *[IMAGE] * 8]
    layer = guard.policy.layers[0]
    assert torch.equal(found[layer][untouched], free[layer][untouched])
    moved = (found[layer] - free[layer]).abs().amax(-1)
    assert float(moved[list(spanned)].min()) > 1e-6
    if edit == Restore(one_sided=False):
        for layer in guard.policy.layers:
            V = guard.policy.directions.vectors[layer, : guard.policy.rank].double()
            for place, counterpart in spanned.items():
                torch.testing.assert_close(
                    V @ found[layer][place], V @ text[layer][counterpart], rtol=1e-5, atol=1e-5
                )


# --- 6. a guarded answer equals both passes by hand ---


def same_as_by_hand(
    model: Model, processor: LlavaProcessor, guard: Guard, question: str, *, steps: int
) -> Any:
    """A guarded answer, whose tokens and logits are those of both passes by hand."""
    inputs = ask(processor, [question], dtype=torch.float64)
    tokens, logits = guarded_by_hand(model, processor, guard, question, steps=steps)
    with guard.attach(model):
        out = answer(model, inputs, max_new_tokens=steps)
    assert new_tokens(out, inputs)[0].tolist() == tokens
    for mine, theirs in zip(out.logits, logits, strict=True):
        exact(mine[0], theirs)
    return out


@pytest.mark.parametrize(("edit", "question"), in_turns(EDITS, QUESTIONS[:2]))
def test_a_guarded_answer_equals_both_passes_by_hand(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, edit: Edit, question: str
) -> None:
    """Float64 to 1e-10: the tokens that the edit spans at prefill, and held while decoding."""
    out = same_as_by_hand(exact_model, processor, open_guard.variant(edit=edit), question, steps=6)
    inputs = ask(processor, [question], dtype=torch.float64)
    free = answer(exact_model, inputs, max_new_tokens=6)
    assert not torch.allclose(free.logits[0], out.logits[0])


@pytest.mark.parametrize(
    ("edit", "length"),
    in_turns(
        {name: EDITS[name] for name in ("restore", "refuse", "project, request", "flipped")},
        [1, 3, 6],
    ),
)
def test_an_answer_is_edited_for_as_long_as_it_opens_as_a_refusal(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, edit: Edit, length: int
) -> None:
    """Float64 to 1e-10; what the text alone goes on with is aimed at, and then nothing more."""
    plain = open_guard.variant(edit=edit)
    guard = opened_by_hand(exact_model, processor, plain, QUESTIONS[0], length=length)
    inputs = ask(processor, QUESTIONS[:1], dtype=torch.float64)
    out = same_as_by_hand(exact_model, processor, guard, QUESTIONS[0], steps=8)
    assert tuple(new_tokens(out, inputs)[0, :length].tolist()) == guard.policy.refusal_prefix
    with plain.attach(exact_model):
        before = answer(exact_model, inputs, max_new_tokens=8)
    exact(before.logits[0], out.logits[0])
    assert not torch.allclose(before.logits[1], out.logits[1])


def test_an_answer_that_leaves_the_opening_is_left_alone_from_there(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    """Its later tokens are not edited, though they be the opening's."""
    plain = spanning(open_guard, Span.OPENING)
    opening = opened_by_hand(exact_model, processor, plain, QUESTIONS[0]).policy.refusal_prefix
    other = opening[1] + 1
    for guard in (
        plain.variant(refusal_prefix=(opening[0], other, opening[2])),
        plain.variant(refusal_prefix=(other, opening[1], opening[2])),
    ):
        same_as_by_hand(exact_model, processor, guard, QUESTIONS[0], steps=6)


def test_a_closed_row_that_opens_as_a_refusal_is_the_models_own(
    exact_model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """Bit for bit, beside rows that are edited over the very same tokens."""
    inputs = ask(processor, QUESTIONS, dtype=torch.float64)
    free = answer(exact_model, inputs, max_new_tokens=6)
    for closed in range(len(QUESTIONS)):
        opening = tuple(new_tokens(free, inputs)[closed, :4].tolist())
        mixed, is_open = half_open(exact_model, spanning(guard, Span.OPENING), inputs)
        if is_open[closed]:
            continue
        with mixed.variant(refusal_prefix=opening).attach(exact_model):
            out = answer(exact_model, inputs, max_new_tokens=6)
        for row, opened in enumerate(is_open):
            if not opened:
                assert all(
                    torch.equal(mine[row], own[row])
                    for mine, own in zip(out.logits, free.logits, strict=True)
                )
    assert sorted(is_open) == [False, False, True, True]


@pytest.mark.parametrize(
    "changes",
    [{"rank": 1}, {"rank": 8}, {"layers": (0, 5)}, {"random_seed": 3}, {"edit": Restore(0.3)}],
)
def test_rank_layers_strength_and_the_random_control_by_hand(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, changes: dict[str, Any]
) -> None:
    guard = open_guard.variant(**changes)
    out = same_as_by_hand(exact_model, processor, guard, QUESTIONS[0], steps=3)
    inputs = ask(processor, QUESTIONS[:1], dtype=torch.float64)
    with open_guard.attach(exact_model):
        assert not torch.allclose(answer(exact_model, inputs).logits[0], out.logits[0])


@pytest.mark.parametrize("span", [Span.REQUEST, Span.LAST])
def test_prompt_tokens_before_those_that_are_edited_are_as_they_were(
    model: Model, processor: LlavaProcessor, open_guard: Guard, span: Span
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    edited = 1 if span is Span.LAST else behind_the_image(inputs)
    guard = open_guard.variant(edit=Refuse(span=span))
    with torch.no_grad():
        free = model(**inputs).logits[0]
        with guard.attach(model):
            guarded = model(**inputs).logits[0]
    assert torch.equal(free[:-edited], guarded[:-edited])
    for place in range(-edited, 0):
        assert not torch.equal(free[place], guarded[place])


# --- any caller ---


#: What is edited after the prompt.
HELD = ("nothing", "the opening", "everything")


def held(
    model: Model, processor: LlavaProcessor, guard: Guard, after: str, question: str = QUESTIONS[0]
) -> Guard:
    """The guard that edits so much after the prompt; its answer to the question has an opening."""
    guard = spanning(guard, Span.ANSWER if after == "everything" else Span.OPENING)
    return opened_by_hand(model, processor, guard, question) if after == "the opening" else guard


@pytest.mark.parametrize("after", HELD)
def test_generate_equals_a_loop_of_forward_with_a_cache(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, after: str
) -> None:
    guard = held(exact_model, processor, open_guard, after)
    inputs = ask(processor, QUESTIONS, dtype=torch.float64)
    with guard.attach(exact_model), torch.no_grad():
        out = answer(exact_model, inputs)
        mask = inputs["attention_mask"]
        last = exact_model(**inputs, position_ids=positions(mask), use_cache=True)
        for number, expected in enumerate(out.logits):
            exact(last.logits[:, -1], expected)
            assert torch.equal(last.logits[:, -1].argmax(-1), new_tokens(out, inputs)[:, number])
            last = step(exact_model, last, mask)
            mask = torch.cat([mask, torch.ones(len(mask), 1).long()], dim=1)


WAYS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "chunks of 5": {"prefill_chunk_size": 5},
    "all but one token first": {"prefill_chunk_size": -1},
    "static cache": {"cache_implementation": "static"},
    "by position": {},
}


LONG = "Which colour? Which colour? Which colour?"


@pytest.fixture(scope="module", params=HELD)
def answered_by_hand(
    request: pytest.FixtureRequest, exact_model: Model, processor: LlavaProcessor, open_guard: Guard
) -> tuple[Guard, list[int]]:
    """A guard, and the eight tokens of its answer to `LONG`, once for all ways of decoding."""
    guard = held(exact_model, processor, open_guard, request.param, LONG)
    return guard, guarded_by_hand(exact_model, processor, guard, LONG, steps=8)[0]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_gives_the_same_answer(
    exact_model: Model,
    processor: LlavaProcessor,
    answered_by_hand: tuple[Guard, list[int]],
    way: str,
) -> None:
    """Float64, greedy: the same tokens as `guarded_by_hand`, and not the unguarded ones."""
    guard, expected = answered_by_hand
    inputs = ask(processor, [LONG], dtype=torch.float64)
    options = {"max_new_tokens": 8, "do_sample": False, **WAYS[way]}
    if options.get("prefill_chunk_size") == -1:
        options["prefill_chunk_size"] = inputs["input_ids"].shape[1] - 1
    free = exact_model.generate(**inputs, **options)
    with guard.attach(exact_model):
        if way == "by position":
            ids = inputs.pop("input_ids")
            out = exact_model.generate(ids, GenerationConfig(**options), **inputs)
            inputs["input_ids"] = ids
        else:
            out = exact_model.generate(**inputs, **options)
        assert len(guard.receipts) == 1
    assert len(expected) == 8
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected
    assert not torch.equal(out, free)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("after", HELD)
def test_an_assistant_model_only_drafts(
    exact_model: Model,
    processor: LlavaProcessor,
    guard: Guard,
    open_guard: Guard,
    after: str,
    looks: bool,
) -> None:
    """The first pass reads drafts behind the prompt, and where the gate looks, it looks before."""
    opens = with_thresholds(guard, CLOSED, image=-CLOSED).policy.gate
    guard = open_guard.variant(layers=guard.policy.layers if looks else open_guard.policy.layers)
    guard = held(exact_model, processor, guard, after).variant(
        gate=opens if looks else GATES["open"]
    )
    inputs = ask(processor, QUESTIONS[:1], dtype=torch.float64)
    options = {"max_new_tokens": 8, "do_sample": False}
    assistant = copy.deepcopy(exact_model)
    with guard.attach(exact_model):
        expected = exact_model.generate(**inputs, **options)
        (receipt,) = guard.receipts
        drafted = exact_model.generate(**inputs, **options, assistant_model=assistant)
        same_receipt(guard.receipts[0], receipt)
    assert torch.equal(drafted, expected)
    assert receipt.guarded
    assert (receipt.scores.get("image_score") is not None) == looks


@pytest.mark.parametrize("hold", [True, False])
def test_a_chat_that_keeps_its_cache_is_judged_as_a_whole(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, hold: bool
) -> None:
    """The second turn's tokens follow from the whole conversation's text-only view."""
    guard = spanning(open_guard, Span.ANSWER if hold else Span.OPENING)
    inputs = ask(processor, QUESTIONS[:2], dtype=torch.float64)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with guard.attach(exact_model):
        first = exact_model.generate(**inputs, **options, return_dict_in_generate=True)
        more = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
        turn = {"input_ids": torch.cat([first.sequences, more], dim=1)}
        grown = turn["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        turn["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones(2, grown).long()], dim=1
        )
        second = exact_model.generate(**turn, **options, past_key_values=first.past_key_values)
        receipts = guard.receipts
        whole = {**turn, "pixel_values": inputs["pixel_values"]}
        exact_model.generate(**whole, **options)
        for kept, fresh in zip(receipts, guard.receipts, strict=True):
            assert kept.text_tokens == fresh.text_tokens
            assert kept.images == fresh.images == 1
            assert kept.guarded
    assert second.shape[1] == turn["input_ids"].shape[1] + 4


def read_before(
    model: Model, inputs: dict[str, Tensor], left: int
) -> tuple[dict[str, Tensor], Any]:
    """A prompt, and a cache of all but its last tokens, filled as it is: engines share prefixes."""
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    short = {**inputs, **{name: value[:, :-left] for name, value in prompt.items()}}
    read = model.generate(**short, max_new_tokens=1, return_dict_in_generate=True)
    return prompt, read.past_key_values


@pytest.mark.parametrize("span", [Span.REQUEST, Span.LAST])
def test_a_prompt_read_before_but_for_its_last_token_is_edited_there(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, span: Span
) -> None:
    """Whatever the edit spans: what a cache holds is not edited."""
    inputs = ask(processor, QUESTIONS, dtype=torch.float64)
    options = {"max_new_tokens": 6, "do_sample": False}
    prompt, cache = read_before(exact_model, inputs, 1)
    at_last, guard = (open_guard.variant(edit=Refuse(span=each)) for each in (Span.LAST, span))
    with at_last.attach(exact_model):
        expected = exact_model.generate(**inputs, **options)
    with guard.attach(exact_model):
        found = exact_model.generate(**prompt, **options, past_key_values=cache)
        for mine, theirs in zip(guard.receipts, at_last.receipts, strict=True):
            same_receipt(mine, theirs)
        whole = exact_model.generate(**inputs, **options)
    assert torch.equal(found, expected)
    assert torch.equal(whole, expected) == (span is Span.LAST)


def test_a_prompt_read_before_as_far_as_its_image_gives_the_same_answer(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS[:1], dtype=torch.float64)
    prompt, cache = read_before(exact_model, inputs, behind_the_image(inputs))
    with open_guard.attach(exact_model):
        expected = answer(exact_model, inputs)
        (receipt,) = open_guard.receipts
        found = answer(exact_model, prompt, past_key_values=cache)
        same_receipt(open_guard.receipts[0], receipt)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        exact(mine, theirs)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_prompt_read_in_pieces_is_edited_as_in_one(
    exact_model: Model, processor: LlavaProcessor, guard: Guard, chunk: int, hold: bool
) -> None:
    """In a batch whose rows the text opens or not; a closed row is bit for bit the model's own."""
    inputs = ask(processor, QUESTIONS, dtype=torch.float64)
    mixed, is_open = half_open(
        exact_model, spanning(guard, Span.ANSWER if hold else Span.OPENING), inputs
    )
    free = answer(exact_model, inputs, prefill_chunk_size=chunk)
    with mixed.attach(exact_model):
        whole = answer(exact_model, inputs)
        receipts = mixed.receipts
        pieces = answer(exact_model, inputs, prefill_chunk_size=chunk)
        for mine, theirs in zip(mixed.receipts, receipts, strict=True):
            same_receipt(mine, theirs)
    assert torch.equal(pieces.sequences, whole.sequences)
    count = len(whole.logits)  # the head is asked for each piece, too
    for mine, theirs, own in zip(
        pieces.logits[-count:], whole.logits, free.logits[-count:], strict=True
    ):
        exact(mine, theirs)
        for row, opened in enumerate(is_open):
            assert torch.equal(mine[row], own[row]) != opened


@pytest.mark.parametrize("left", [1, 4])
def test_the_image_opens_the_gate_for_the_piece_that_holds_the_end(
    exact_model: Model, processor: LlavaProcessor, guard: Guard, left: int
) -> None:
    """Not for pieces read before: the decision is made at the prompt's end."""
    inputs = ask(processor, QUESTIONS[:1], dtype=torch.float64)
    assert left < behind_the_image(inputs)
    looks = with_thresholds(guard, CLOSED, image=-CLOSED)
    prompt, cache = read_before(exact_model, inputs, left)
    length = inputs["input_ids"].shape[1]
    with looks.attach(exact_model):
        expected = answer(exact_model, prompt, past_key_values=cache)
        (receipt,) = looks.receipts
        pieces = answer(exact_model, inputs, prefill_chunk_size=length - left)
        same_receipt(looks.receipts[0], receipt)
        whole = answer(exact_model, inputs)
        same_receipt(looks.receipts[0], receipt)
    assert receipt.guarded
    for mine, theirs in zip(pieces.logits[1:], expected.logits, strict=True):
        exact(mine, theirs)
    assert not torch.allclose(whole.logits[0], expected.logits[0])


def test_prompts_read_in_pieces_have_to_come_with_their_mask_if_padded(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    """Each piece shows the mask as far as itself, so padding further on would not be known."""
    padded, alone = ask(processor, QUESTIONS), ask(processor, QUESTIONS[:1])
    with open_guard.attach(model):
        expected = answer(model, alone, prefill_chunk_size=5)
        del padded["attention_mask"], alone["attention_mask"]
        with pytest.raises(SafeguardError, match="Pass attention_mask to generate"):
            model.generate(**padded, max_new_tokens=1, prefill_chunk_size=5)
        found = answer(model, alone, prefill_chunk_size=5)
    assert all(map(torch.equal, found.logits, expected.logits))


def test_the_text_pass_reads_each_different_text_once(
    model: Model, processor: LlavaProcessor, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_texts = Backbone.read_texts

    def counted(self: Backbone, texts: Any, start: TextPass | None = None) -> TextPass:
        read.append(len(texts))
        return read_texts(self, texts, start)

    asked = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0], QUESTIONS[2]]
    inputs = ask(processor, asked, images=[True, True, True, False])
    with guard.attach(model):
        monkeypatch.setattr(Backbone, "read_texts", counted)
        model.generate(**inputs, max_new_tokens=1, num_beams=3)
        scores = [receipt.scores.get("text_score") for receipt in guard.receipts]
        model.generate(**ask(processor, asked, images=[False] * 4), max_new_tokens=1)
    assert read == [2]  # two different texts that come with an image; none without one
    assert scores[0:3] == scores[6:9]
    assert scores[9] is None


def test_sampling_follows_its_seed(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    with open_guard.attach(model):
        torch.manual_seed(5)
        sampled = answer(model, inputs, **options)
        assert len(open_guard.receipts) == 3 * len(QUESTIONS)
        torch.manual_seed(5)
        again = answer(model, inputs, **options)
        torch.manual_seed(5)
        for number, logits in enumerate(sampled.logits):
            drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            assert torch.equal(drawn, new_tokens(sampled, inputs)[:, number])
        greedy = answer(model, inputs)
        certain = answer(model, inputs, **options | {"top_k": 1})
    assert torch.equal(sampled.sequences, again.sequences)
    assert len(set(map(tuple, sampled.sequences.tolist()))) > len(QUESTIONS)
    assert torch.equal(certain.sequences, greedy.sequences.repeat_interleave(3, dim=0))


class Collect(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming(model: Model, processor: LlavaProcessor, open_guard: Guard) -> None:
    inputs, streamer = ask(processor, QUESTIONS[:1]), Collect()
    with open_guard.attach(model):
        expected = answer(model, inputs)
        streamed = answer(model, inputs, streamer=streamer)
    assert torch.equal(streamed.sequences, expected.sequences)
    assert streamer.values == expected.sequences[0].tolist()
    assert streamer.ended


def test_gradients_still_flow(model: Model, processor: LlavaProcessor, open_guard: Guard) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    inputs["pixel_values"].requires_grad_()
    with open_guard.attach(model):
        model(**inputs).logits[0, -1].max().backward()
    gradient = inputs["pixel_values"].grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any()
    model.zero_grad()


# --- receipts, and the gate as they tell it ---


@pytest.mark.parametrize("edit", [Refuse(), Restore(), Project()])
def test_receipts_say_what_was_done(
    exact_model: Model, processor: LlavaProcessor, guard: Guard, edit: Edit
) -> None:
    guard = guard.variant(edit=edit)
    images = [True, False, True, True]
    inputs = ask(processor, QUESTIONS, images=images, dtype=torch.float64)
    scored = [row for row, has in enumerate(images) if has or edit.edits_text]
    layers = guard.policy.criterion(TextScore).layers  # type: ignore[union-attr]
    scores = []
    for question in QUESTIONS:
        states, _ = run_row(exact_model, text_ids(processor, question))
        scores.append(sum(centred(guard, states[n][-1], n) for n in layers) / len(layers))
    ranked = sorted(scores[row] for row in scored)
    threshold = (ranked[0] + ranked[1]) / 2
    guard = with_thresholds(guard, threshold, image=CLOSED)
    assert guard.receipts == []
    with guard.attach(exact_model):
        assert guard.receipts == []  # verifying is not a request
        answer(exact_model, inputs)
    assert len(guard.receipts) == len(QUESTIONS)
    for row, (question, receipt) in enumerate(zip(QUESTIONS, guard.receipts, strict=True)):
        alone = ask(processor, [question], images=images[row], dtype=torch.float64)
        states, _ = run_row(exact_model, alone["input_ids"][0].tolist(), alone.get("pixel_values"))
        opened = row in scored and scores[row] > threshold
        first = guard.policy.layers[0]
        assert (receipt.images, receipt.media_tokens) == ((1, 4) if images[row] else (0, 0))
        assert receipt.text_tokens == len(text_ids(processor, question))
        assert receipt.guarded == opened
        assert receipt.edit == (edit.name if opened else None)
        assert receipt.layers == (guard.policy.layers if opened else ())
        if row in scored:
            assert receipt.scores.get("text_score") == pytest.approx(scores[row], abs=1e-3)
            assert receipt.scores.get("text_threshold") == threshold
        if images[row]:
            expected = centred(guard, states[first][-1], first)
            assert receipt.scores.get("image_score") == pytest.approx(expected, abs=1e-3)
            assert receipt.scores.get("image_threshold") == CLOSED
        else:
            assert receipt.scores.get("image_score") is None
            assert receipt.scores.get("image_threshold") is None
        if row not in scored:
            assert receipt.scores.get("text_score") is None
            assert receipt.scores.get("text_threshold") is None
        if opened:
            before = centred(guard, states[first][-1], first)
            assert receipt.harm_before == pytest.approx(before, abs=1e-3)
            text, _ = run_row(exact_model, text_ids(processor, question))
            wanted = centred(guard, text[first][-1], first)
            origin = centred(guard, torch.zeros(32), first)
            after = {
                "refuse": max(before, wanted, 1.0),
                "restore": max(before, wanted),
                "project": origin,
            }[edit.name]
            assert receipt.harm_after == pytest.approx(after, abs=1e-3)
            assert f"{scores[row]:+.2f}, above {threshold:+.2f}" in receipt.reason
        else:
            assert receipt.harm_before is None
            assert receipt.harm_after is None
            assert ("not above" in receipt.reason) == (row in scored)
            assert ("no image" in receipt.reason) == (row not in scored)


@pytest.mark.parametrize("image_layer", [1, 2])
def test_the_image_opens_the_gate_where_the_text_does_not(
    exact_model: Model, processor: LlavaProcessor, guard: Guard, image_layer: int
) -> None:
    assert guard.policy.layers[0] == 2
    images = [True, True, False, True]
    inputs = ask(processor, QUESTIONS, images=images, dtype=torch.float64)
    scores = {}
    for row, question in enumerate(QUESTIONS):
        if images[row]:
            alone = ask(processor, [question], dtype=torch.float64)
            states, _ = run_row(exact_model, alone["input_ids"][0].tolist(), alone["pixel_values"])
            scores[row] = centred(guard, states[image_layer][-1], image_layer)
    ranked = sorted(scores.values())
    threshold = (ranked[1] + ranked[2]) / 2
    gate = with_thresholds(guard, CLOSED, image=threshold).policy.gate
    looks = gate[-1].model_copy(update={"layer": image_layer})
    by_image = guard.variant(gate=(*gate[:-1], looks))
    free = answer(exact_model, inputs)
    with by_image.attach(exact_model):
        guarded = answer(exact_model, inputs)
    for row, receipt in enumerate(by_image.receipts):
        opened = images[row] and scores[row] > threshold
        assert receipt.guarded == opened
        same = [
            torch.equal(a[row], b[row]) for a, b in zip(free.logits, guarded.logits, strict=True)
        ]
        assert not any(same) if opened else all(same)
        if images[row]:
            assert receipt.scores.get("image_score") == pytest.approx(scores[row], abs=1e-3)
        if opened:
            assert "with its media" in receipt.reason


def test_open_and_papers_receipts(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS)
    with open_guard.attach(model):
        answer(model, inputs)
    for receipt in open_guard.receipts:
        assert receipt.guarded
        assert receipt.scores == {}
        assert receipt.layers == open_guard.policy.layers
    paper = open_guard.variant(layers=tuple(range(6)), gate=GATES["paper"])
    with paper.attach(model):
        answer(model, inputs)
    for receipt in paper.receipts:
        assert receipt.scores["open_layers"] == pytest.approx(len(receipt.layers) / 6)
        assert f"{len(receipt.layers)} of 6" in receipt.reason


def test_harm_is_that_of_the_first_edited_layer(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, [anchor.harmless for anchor in shipped_anchors()[:30]])
    everywhere = open_guard.variant(layers=tuple(range(6)), gate=GATES["paper"])
    with everywhere.attach(model):
        answer(model, inputs)
    late = [r.layers[0] for r in everywhere.receipts if r.layers and r.layers[0] > 0]
    assert late, "no request is closed in the first layer and open in a later one"
    paper = everywhere.variant(layers=(0, late[0]))
    with paper.attach(model):
        answer(model, inputs)
    assert (late[0],) in {receipt.layers for receipt in paper.receipts}
    assert all((receipt.harm_before is None) == (not receipt.layers) for receipt in paper.receipts)


def test_receipts_are_of_the_latest_batch_and_a_copy(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    guard = open_guard.variant()
    with guard.attach(model):
        answer(model, ask(processor, QUESTIONS))
        assert len(guard.receipts) == len(QUESTIONS)
        answer(model, ask(processor, QUESTIONS[:1]))
        assert len(guard.receipts) == 1
    guard.receipts.clear()
    assert len(guard.receipts) == 1


def test_a_guard_that_does_not_hold_leaves_the_answers_tokens_alone(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(QUESTIONS), 1).long()], dim=1)
    token = torch.full((len(QUESTIONS), 1), 7)
    with torch.no_grad():
        with open_guard.attach(model):
            held = model(**inputs, use_cache=True)
        with spanning(open_guard, Span.OPENING).attach(model):
            read = model(**inputs, use_cache=True)
            plain_cache = copy.deepcopy(read.past_key_values)
            step = model(input_ids=token, attention_mask=mask, past_key_values=read.past_key_values)
        free = model(input_ids=token, attention_mask=mask, past_key_values=plain_cache)
    assert torch.equal(held.logits, read.logits)
    assert torch.equal(step.logits, free.logits)
