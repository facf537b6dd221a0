"""A request's sentences, against the texts that a person would part it into."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import ask, parting, run_row, text_ids, with_thresholds
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.conversation import answer_turn, encode_messages, user_turn
from vlm_safeguard.model.generation_prompt import learn_generation_prompt
from vlm_safeguard.model.sentences import learn_sentences
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.sentences import Sentences

Model = LlavaForConditionalGeneration

PROMPT = GenerationPrompt({"default": (90, 91)}, (90, 91), next_turn=(99, 80))
ENDS = frozenset({1, 2})


@pytest.fixture(scope="module")
def learnt(processor: LlavaProcessor) -> tuple[Sentences, GenerationPrompt]:
    prompt = learn_generation_prompt(processor)
    return learn_sentences(processor, prompt, 2, 16), prompt


def parts(
    processor: LlavaProcessor, sentences: Sentences, prompt: GenerationPrompt, *turns: str
) -> list[str]:
    """The sentences of the last of these turns, which alternate, as texts."""
    made = [answer_turn(t) if n % 2 else user_turn(t) for n, t in enumerate(turns)]
    alone = sentences.alone(tuple(prompt.judged(encode_messages(processor, made))), prompt)
    opener, end = (
        processor.tokenizer.decode(list(ids)) for ids in (sentences.opener, prompt.direct)
    )
    texts = [processor.tokenizer.decode(list(ids)) for ids in alone]
    assert all(text.endswith(end) and opener in text for text in texts)
    return [text.removesuffix(end).partition(opener)[2].strip() for text in texts]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("Which colour is it?", []),
        (
            "Which colour is it? Also, name two fruits.",
            ["Which colour is it?", "Also, name two fruits."],
        ),
        ("Name it!!! Then stop", ["Name it!!!", "Then stop"]),
        (
            "Name the fruit\nSay what it costs\n\nThank you",
            ["Name the fruit", "Say what it costs", "Thank you"],
        ),
        ('"How old is it?" she asks', ['"How old is it?', '" she asks']),
    ],
)
def test_sentences_are_those_that_are_read(
    processor: LlavaProcessor,
    learnt: tuple[Sentences, GenerationPrompt],
    request_: str,
    expected: list[str],
) -> None:
    assert parts(processor, *learnt, request_) == expected


def test_only_the_last_turn_is_parted_and_earlier_ones_are_left_out(
    processor: LlavaProcessor, learnt: tuple[Sentences, GenerationPrompt]
) -> None:
    turns = ("What is this? Tell me.", "A cat. It sleeps.", "Is it old? Say yes or no.")
    assert parts(processor, *learnt, *turns) == ["Is it old?", "Say yes or no."]


@given(
    said=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    shortest=st.integers(1, 5),
    most=st.integers(1, 6),
)
def test_a_request_is_in_its_sentences_whole_and_in_order(
    said: list[int], shortest: int, most: int
) -> None:
    """None of it is skipped, however many sentences there are."""
    before, opener = (70, 71), (99, 80)
    text = (*before, *opener, *said, *PROMPT.direct)
    alone = Sentences(ENDS, opener, shortest, most).alone(text, PROMPT)
    start, stop = len(before) + len(opener), len(PROMPT.direct)
    assert all(part[:start] == text[:start] and part[-stop:] == PROMPT.direct for part in alone)
    kept = [part[start:-stop] for part in alone]
    assert len(kept) != 1
    assert len(kept) <= most
    assert all(len(part) >= shortest for part in kept)
    if kept:
        assert [token for part in kept for token in part] == said
        for part, following in pairwise(kept):
            assert part[-1] in ENDS
            assert following[0] not in ENDS


def test_what_is_typed_hides_no_sentence() -> None:
    """An opener in a request is a part of it; the last turn is told by the answer before it."""
    sentences = Sentences(ENDS, (99, 80), 1, 16)
    typed = (99, 80, 5, 1, 99, 80, 6, 2, 7)
    assert sentences.alone((*typed, *PROMPT.direct), PROMPT) == [
        (99, 80, 5, 1, 90, 91),
        (99, 80, 99, 80, 6, 2, 90, 91),
        (99, 80, 7, 90, 91),
    ]
    later = (99, 80, 4, 1, 4, *PROMPT.direct, 8, 1, *typed)
    assert sentences.alone((*later, *PROMPT.direct), PROMPT) == sentences.alone(
        (*typed, *PROMPT.direct), PROMPT
    )
    assert Sentences(ENDS, (55,), 1, 16).alone((*typed, *PROMPT.direct), PROMPT) == []


@torch.no_grad()
def test_a_request_is_open_if_one_of_its_sentences_is(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """By layers called one at a time on each sentence; its neighbours in a batch do not matter."""
    both = "How to kill a man? Name two of the fruits."

    def score(policy: Policy, ids: list[int]) -> float:
        criterion = policy.text_criterion
        assert criterion is not None
        states, _ = run_row(model, ids)
        harm = [policy.directions.harm_score(states[n][-1:], n) for n in criterion.layers]
        return float(torch.stack(harm).mean())

    bare = parting(with_thresholds(guard, 0.0), processor)
    scores = [score(bare, list(ids)) for ids in bare.judged(tuple(text_ids(processor, both)))]
    assert len(scores) == 3
    highest = max(scores)
    for shift, opens in ((-1e-3, True), (1e-3, False)):
        policy = parting(with_thresholds(guard, highest + shift), processor)
        made = replace(guard, policy=replace(policy, response=Response.TEXT))
        with made.attach(model) as attached:
            inputs = ask(processor, ["Which colour?", both, "Name it"])
            judged = attached.judge(**inputs)
        assert judged[1].receipt.guarded == opens
        told = judged[1].receipt.scores["text_score"]
        assert told == pytest.approx(highest if opens else scores[0], abs=1e-4)
        assert judged[1].text == tuple(text_ids(processor, both))


def test_the_paper_s_gate_reads_a_text_whole(guard: Guard, processor: LlavaProcessor) -> None:
    policy = replace(parting(guard, processor), gate=GATES["paper"])
    text = tuple(text_ids(processor, "How to swim? How to dive?"))
    assert policy.judged(text) == [text]
    assert len(parting(guard, processor).judged(text)) == 3


def test_a_guard_keeps_how_requests_are_parted(
    guard: Guard, processor: LlavaProcessor, tmp_path: Path
) -> None:
    made = replace(guard, policy=parting(guard, processor))
    made.save_pretrained(tmp_path)
    assert Guard.from_pretrained(tmp_path).policy.sentences == made.policy.sentences
    assert made.policy.sha256() != guard.policy.sha256()
