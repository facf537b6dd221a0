"""What texts begin with, read once: against texts that are read whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.observe import decoder_passes
from support.reference import parting, run_row, with_thresholds
from tiny import load_makers
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import Turn, chat_of, encode_chat, encode_chats
from vlm_safeguard.model.text_starts import TextStarts
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.response import Response

Model = LlavaForConditionalGeneration
SYSTEM = "You are kind" + " and good" * 20
REQUESTS = (
    "How to kill a man? Name two of the fruits. Stop there.",
    "Which colour?",
    "Why? Say it.",
)


def chats(
    processor: LlavaProcessor,
    requests: Sequence[str],
    systems: Sequence[str] = (SYSTEM,),
    *,
    image: bool = True,
) -> dict[str, Tensor]:
    """Model inputs of these requests in turn under these system prompts."""
    asked = [
        (
            *([Turn("system", (systems[n % len(systems)],))] if systems[n % len(systems)] else []),
            *chat_of(request, *([noise_image(n)] if image else [])),
        )
        for n, request in enumerate(requests)
    ]
    inputs: Any = encode_chats(processor, asked)
    return dict(inputs)


@pytest.fixture
def parted(guard: Guard, processor: LlavaProcessor) -> Guard:
    """It judges sentences, and answers open requests from their texts."""
    policy = parting(with_thresholds(guard, 0.0), processor)
    return replace(guard, policy=replace(policy, response=Response.TEXT))


def width(passes: Sequence[tuple[int, int]]) -> int:
    """Tokens that passes read, with their padding."""
    return sum(rows * tokens for rows, tokens in passes)


@torch.no_grad()
def test_texts_behind_a_start_are_as_if_they_were_read_whole(
    exact_model: Model, processor: LlavaProcessor
) -> None:
    """Their last states and all keys and values, whether or not the start was read before."""
    backbone, starts = Backbone.of(exact_model), TextStarts()
    texts = [tuple(encode_chat(processor, text)) for text in REQUESTS]
    start = texts[0][:3]
    found = []
    for made in (1, 0):
        with decoder_passes(exact_model) as passes:
            begun = starts.of(backbone, start, max(map(len, texts)))
        assert passes == [(1, 3)] * made
        found.append(backbone.read_texts(texts, begun))
    assert torch.equal(found[0].final, found[1].final)
    whole = backbone.read_texts(texts)
    assert torch.equal(found[0].mask, whole.mask)
    assert found[0].cache is not None
    assert whole.cache is not None
    for row, text in enumerate(texts):
        states, _ = run_row(exact_model, text)
        last = exact_model.model.language_model.norm(states[-1][-1])
        torch.testing.assert_close(found[0].final[row], last, rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(found[0].cache.layers, whole.cache.layers, strict=True):
            for name in ("keys", "values"):
                left, right = (getattr(x, name)[row, :, -len(text) :] for x in (mine, theirs))
                torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_is_kept_of_starts_is_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest ones stay, and the very latest one however long it is."""
    monkeypatch.setattr("vlm_safeguard.model.text_starts._TOKENS", 10)
    backbone, starts = Backbone.of(model), TextStarts()
    a, b, long = (20,) * 4, (21,) * 6, (22,) * 30

    def read(*wanted: tuple[int, ...]) -> list[int]:
        with decoder_passes(model) as passes:
            for start in wanted:
                starts.of(backbone, start, 40)
        return [tokens for _, tokens in passes]

    assert read(a, b, a, b) == [4, 6]
    assert read((23,), a, b, a) == [1, 4, 6]
    assert read(long, long, a, long) == [30, 4, 30]
    starts.clear()
    assert read(long) == [30]


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "longest"), [("gemma3", 15), ("paligemma", 0)])
def test_texts_that_cannot_go_on_from_a_start_are_read_whole(model_type: str, longest: int) -> None:
    """Some layers of the small Gemma see 16 tokens; PaliGemma's tokens see what follows them."""
    model, _ = load_makers()[model_type]()
    backbone = Backbone.of(model)
    start = (backbone.text_token,) * 3
    for length in (8, 15, 16, 17, 40):
        read = TextStarts().of(backbone, start, length)
        assert (read is not None) == (length <= longest)


@torch.no_grad()
def test_texts_in_a_sliding_window_go_on_from_a_start_and_out_of_it() -> None:
    """An answer that leaves the small Gemma's window of 16 tokens is as behind texts read whole."""
    model, _ = load_makers()["gemma3"]()
    backbone = Backbone.of(model.double())
    token = backbone.text_token
    start = (token, token + 1, token + 2)
    texts = [(*start, *range(token + 3, token + 3 + more)) for more in (12, 4)]
    begun = TextStarts().of(backbone, start, 15)
    assert begun is not None
    read, whole = backbone.read_texts(texts, begun), backbone.read_texts(texts)
    torch.testing.assert_close(read.final, whole.final, rtol=1e-5, atol=1e-5)
    answer = range(token, token + 6)
    found, wanted = (backbone.go_on(each, texts, answer) for each in (read, whole))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    alone = backbone.run_text(texts, answer)[:, 1:]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("systems", [(SYSTEM,), ("",), (SYSTEM, "Be brief.")])
def test_open_requests_are_answered_as_without_images(
    model: Model, processor: LlavaProcessor, parted: Guard, systems: Sequence[str], way: str
) -> None:
    """Padded, and behind one system prompt, none, or different ones."""
    opened = parted.variant(gate=GATES["open"])
    options = {"max_new_tokens": 6, "do_sample": False, **WAYS[way]}
    answers = []
    plain = chats(processor, REQUESTS, systems, image=False)
    torch.manual_seed(0)
    wanted = model.generate(**plain, **options)[:, plain["input_ids"].shape[1] :]
    with opened.attach(model):
        for _ in range(2):
            inputs = chats(processor, REQUESTS, systems)
            torch.manual_seed(0)
            answers.append(model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(answers[0], wanted)
    assert torch.equal(answers[1], wanted)


def test_a_start_is_read_once_while_a_guard_is_on(
    model: Model, processor: LlavaProcessor, guard: Guard, parted: Guard
) -> None:
    """Whoever asks later gets the same receipts for fewer tokens."""
    closed = parted.variant(gate=with_thresholds(guard, 1e9).policy.gate)
    inputs = chats(processor, REQUESTS)
    read, receipts = [], []
    for _ in range(2):  # what is kept goes with the block
        with closed.attach(model) as attached:
            for _ in range(2):
                with decoder_passes(model) as passes:
                    judged = attached.judge(**inputs)
                read.append(width(passes))
                receipts.append([each.receipt for each in judged])
    start = len(closed.policy.start(judged[0].text))
    assert start > 40
    assert read[0] - read[1] == start
    assert read == read[:2] * 2
    assert all(each == receipts[0] for each in receipts)
    whole = closed.variant(sentences=None)
    with whole.attach(model) as attached:
        scores = [each.receipt.scores["text_score"] for each in attached.judge(**inputs)]
    found = [each.scores["text_score"] for each in receipts[0]]
    assert found == pytest.approx(scores, abs=1e-4)


def test_a_start_that_was_read_in_inference_mode_serves_other_modes(
    model: Model, processor: LlavaProcessor, parted: Guard
) -> None:
    opened = parted.variant(gate=GATES["open"])
    inputs = chats(processor, REQUESTS)
    with opened.attach(model):
        with torch.inference_mode():
            before = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        after = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(before, after)


def test_what_precedes_a_request_is_its_start(processor: LlavaProcessor, parted: Guard) -> None:
    policy = parted.policy
    decode = processor.tokenizer.decode
    first, second = (
        tuple(encode_chat(processor, text)) for text in ("Which colour?", "How to bake? Say it.")
    )
    start = policy.start(first)
    assert start == policy.start(second)
    assert decode(list(first[len(start) :])).startswith("Which colour?")
    assert policy.start((55, 56, 57)) == ()
    assert replace(policy, sentences=None).start(first) == ()
