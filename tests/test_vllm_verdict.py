"""Inside vLLM: what is read of a request, and what is decided from log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.vllm import entries_of, next_entry
from vlm_safeguard.anchors import shipped_anchors
from vlm_safeguard.engines.vllm.gate import runnable
from vlm_safeguard.engines.vllm.verdict import Answer, Judge
from vlm_safeguard.engines.vllm.view import read_rendered
from vlm_safeguard.engines.vllm.worker_options import worker_options
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.activations import text_states
from vlm_safeguard.model.backbone import Backbone, chat_inputs
from vlm_safeguard.model.conversation import chat_of, encode_messages, noise_media, user_message
from vlm_safeguard.policy.discriminant import fit_discriminant
from vlm_safeguard.policy.edits import Add
from vlm_safeguard.policy.gate import GATES, PaperSign, TextDiscriminant, TextScore
from vlm_safeguard.policy.own_refusal import (
    OwnRefusal,
    RefusalDiscriminant,
    RefusalWords,
)
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.refusal import first_token_margin, token_margin
from vlm_safeguard.policy.request import Request, read_request
from vlm_safeguard.policy.response import Response

TOKENS, PREFIX = (7, 9), (7, 11, 12)


@pytest.fixture(scope="module")
def policy(guard: Guard) -> Policy:
    words = RefusalWords(tokens=TOKENS, slack=0.5)
    return replace(guard.policy, gate=(words,), refusal_prefix=PREFIX, response=Response.TEXT)


@pytest.fixture(scope="module")
def prompt(processor: LlavaProcessor) -> list[int]:
    """Two images, a text between them."""
    messages = [user_message("image", "What is this?", "image", "And this?")]
    return encode_messages(processor, messages, noise_media(processor, messages))


def ranges_in(prompt: list[int], image: int) -> list[tuple[int, int]]:
    """By hand: maximal runs of the image token."""
    starts = [i for i, t in enumerate(prompt) if t == image and prompt[i - 1] != image]
    stops = [i + 1 for i, t in enumerate(prompt) if t == image and prompt[i + 1] != image]
    return list(zip(starts, stops, strict=True))


# --- the policy ---


def test_an_edit_of_requests_without_media_is_refused(policy: Policy) -> None:
    edits = replace(policy, response=Response.EDIT)
    assert runnable(edits, refusal_alone=False) is edits
    with pytest.raises(SafeguardError, match="'add' acts on requests without media"):
        runnable(replace(edits, edit=Add()), refusal_alone=False)


def test_the_models_own_refusal_may_decide_alone(guard: Guard, policy: Policy) -> None:
    own = OwnRefusal(tokens=TOKENS, slack=0.25, layers=(1, 2))
    text = TextScore(layers=(1,), threshold=0.0, budget=0.1, calibrated_on=20)
    asked = replace(policy, gate=(own, text))
    assert runnable(asked, refusal_alone=False) is asked
    made = runnable(asked, refusal_alone=True)
    assert made.gate == (RefusalWords(tokens=TOKENS, slack=0.25),)
    assert made.sha256() != asked.sha256()


@pytest.mark.parametrize("alone", [True, False])
def test_a_gate_of_words_runs_as_it_is(policy: Policy, alone: bool) -> None:
    assert runnable(policy, refusal_alone=alone) is policy
    assert worker_options(Judge(policy)) == {}


@pytest.mark.parametrize("name", sorted(GATES))
def test_a_gate_without_the_models_own_refusal_cannot_leave_it_to_that(
    policy: Policy, name: str
) -> None:
    with pytest.raises(SafeguardError, match="does not ask for the model's own refusal"):
        runnable(replace(policy, gate=GATES[name]), refusal_alone=True)


def test_a_guard_that_does_not_know_where_answers_begin_is_refused(policy: Policy) -> None:
    with pytest.raises(SafeguardError, match="Fit it again"):
        runnable(replace(policy, generation_prompt=None), refusal_alone=True)


# --- the request ---


def test_a_rendered_request_is_read_as_transformers_is(
    policy: Policy, prompt: list[int], processor: LlavaProcessor
) -> None:
    placed = ranges_in(prompt, processor.image_token_id)
    assert len(placed) == 2
    request = read_rendered(policy, prompt, placed)
    assert request == read_request(policy, prompt)
    assert request.media.images == 2
    messages = [user_message("What is this?", "And this?")]
    assert list(request.text) == encode_messages(processor, messages)


def test_what_only_one_side_takes_for_a_medium_is_refused(
    policy: Policy, prompt: list[int], processor: LlavaProcessor
) -> None:
    first, second = ranges_in(prompt, processor.image_token_id)
    with pytest.raises(ValueError, match=f"token {second[0]} .* no medium was placed"):
        read_rendered(policy, prompt, [first])
    with pytest.raises(ValueError, match="where the guard reads none"):
        read_rendered(policy, prompt, [first, second, (second[1], second[1] + 2)])
    with pytest.raises(ValueError, match="where the guard reads none"):
        read_rendered(policy, prompt, [(first[0], second[1])])
    with pytest.raises(ValueError, match="no medium was placed"):
        read_rendered(policy, prompt, [])


def test_a_text_needs_no_generation_prompt(policy: Policy) -> None:
    assert read_rendered(policy, [20, 21, 22], []).text == (20, 21, 22)


# --- the verdict ---


@pytest.mark.parametrize("seed", range(8))
def test_margins_are_those_of_logits(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    text = (20, 21, 22, 23)
    judge = Judge(policy)
    ids = [*text, *PREFIX]
    logits = torch.randn(len(ids), 40, generator=generator)
    logits[len(text) - 1, list(TOKENS)] += 4.0 * (seed % 2)
    first = first_token_margin(logits[len(text) - 1 : len(text)], TOKENS)
    each = token_margin(logits[len(text) - 1 : -1], torch.tensor(PREFIX))
    answer = Answer(next_entry(logits[: len(text)], len(TOKENS) + 1))
    margin, words = judge.margins(answer)
    assert margin == words
    assert (margin > 0) == bool(first > 0) == judge.awaits_words(answer, alone=False)
    assert margin >= float(first) - 1e-4
    if margin > 0:
        assert margin == pytest.approx(float(first), abs=1e-4)
        read = entries_of(logits, ids, len(TOKENS) + 1)[len(text) :]
        answer = replace(answer, words=read, said=PREFIX)
        assert not judge.awaits_words(answer, alone=False)
        assert judge.margins(answer) == pytest.approx((margin, float(each.min())), abs=1e-4)


def test_behind_a_sentence_no_words_are_read_where_its_score_decides(policy: Policy) -> None:
    logits = torch.zeros(3, 40)
    logits[2, PREFIX[0]] = 9.0
    answer = Answer(next_entry(logits, len(TOKENS) + 1))
    scored = OwnRefusal(tokens=TOKENS, slack=0.5, layers=(1,), score_floor=-9.0, score_above=9.0)
    for gate, alone in (((RefusalWords(tokens=TOKENS, slack=0.5),), True), ((scored,), False)):
        judge = Judge(replace(policy, gate=gate))
        harmful = policy.directions.harmful_mean
        made = replace(answer, states={n: harmful[n, None] for n in judge.layers})  # scores 1
        assert judge.awaits_words(made, alone=False)
        assert judge.awaits_words(made, alone=True) == alone


def test_other_words_than_those_that_the_first_token_begins_are_not_read(policy: Policy) -> None:
    """Where edited answers follow the usual ones, these were read behind the text already."""
    other = (TOKENS[1], 30)
    judge = Judge(replace(policy, other_prefixes=(other,)))
    ids = [20, 21, 22, *other]
    logits = torch.randn(len(ids), 40, generator=torch.Generator().manual_seed(0))
    logits[2, other[0]] += 9.0
    entries = entries_of(logits, ids, len(TOKENS) + 1)[3:]
    first = next_entry(logits[:3], len(TOKENS) + 1)
    usual = Answer(first, entries[:1] * len(PREFIX), PREFIX)
    assert judge.awaits_words(usual, alone=False)
    assert judge.words(usual) == other
    read = replace(usual, words=entries, said=other)
    assert not judge.awaits_words(read, alone=False)
    expected = token_margin(logits[2:-1], torch.tensor(other))
    assert judge.margins(read)[1] == pytest.approx(float(expected.min()), abs=1e-4)


def test_missing_log_probabilities_are_no_verdict(policy: Policy) -> None:
    request = read_request(policy, (20, 21, 22))
    judge = Judge(policy)
    ids = [*request.text, *PREFIX]
    logits = torch.randn(len(ids), 40)
    logits[2, PREFIX[0]] += 9.0
    words = entries_of(logits, ids, len(TOKENS) + 1)[3:]
    with pytest.raises(ValueError, match="words of a refusal were not read"):
        judge.receipt(request, [Answer(words[0])])
    with pytest.raises(ValueError, match="argument"):
        judge.receipt(request, [Answer(words[0], words[:-1], PREFIX)])
    for entry in (None, {PREFIX[0]: SimpleNamespace(logprob=-1.0)}):
        with pytest.raises(ValueError, match="lack those"):
            judge.receipt(request, [Answer(entry)])
    for chances in ((-torch.inf, -1.0, -1.0), (torch.nan, -1.0, -1.0)):
        lost = dict(enumerate(SimpleNamespace(logprob=each) for each in chances))
        shown = {PREFIX[0]: lost[0], 1: lost[1], 2: lost[2]}
        with pytest.raises(SafeguardError, match="not a number"):
            judge.receipt(request, [Answer(shown)])


def answer_of(judge: Judge, model: Any, request: Request, states: Any = None) -> Answer:
    """What an engine of this model gives to a request's question, and to what is asked further."""
    count, text = judge.likeliest, list(request.text)
    assert count is not None
    answer = Answer(next_entry(model(input_ids=torch.tensor([text])).logits[0], count))
    answer = replace(answer, states=states or {})
    if not judge.awaits_words(answer, alone=False):
        return answer
    said = judge.words(answer)
    ids = [*text, *said]
    entries = entries_of(model(input_ids=torch.tensor([ids])).logits[0], ids, count)
    return replace(answer, words=entries[len(text) :], said=said)


@torch.no_grad()
def test_the_verdict_is_that_of_transformers(
    policy: Policy, guard: Guard, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """The model's most common next tokens stand for its refusals, so that some gates open."""
    texts = [f"{a} {b}?" for a in ("What", "Who", "How", "Why") for b in ("is", "are", "was")]
    read = [read_request(policy, encode_messages(processor, [user_message(t)])) for t in texts]
    prefixes: dict[int, tuple[int, ...]] = {}
    for each in read:
        said = model.generate(torch.tensor([each.text]), max_new_tokens=2, do_sample=False)
        opening, behind = said[0, -2:].tolist()
        prefixes.setdefault(opening, (opening, behind))
    (opening, first), (other, second) = list(prefixes.items())[:2]
    mine = replace(
        policy,
        gate=(RefusalWords(tokens=(opening, other), slack=0.5),),
        refusal_prefix=first,
        other_prefixes=(second,),
    )
    judge = Judge(mine)
    verdicts = [judge.receipt(each, [answer_of(judge, model, each)]) for each in read]
    assert {receipt.guarded for receipt in verdicts} == {True, False}
    attached = guard.variant(
        gate=mine.gate,
        refusal_prefix=mine.refusal_prefix,
        other_prefixes=mine.other_prefixes,
        response=Response.TEXT,
    )
    with attached.attach(model):
        for text, verdict in zip(texts, verdicts, strict=True):
            inputs = chat_inputs(model, processor, [chat_of(text, noise_image(0))])
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            (receipt,) = attached.receipts
            assert receipt.guarded == verdict.guarded
            assert receipt.reason == verdict.reason
            assert receipt.policy == verdict.policy
            assert verdict.scores.keys() == receipt.scores.keys()
            for name, value in receipt.scores.items():
                if name != "own_refusal" or value > 0:  # below 0 it is a bound
                    assert verdict.scores[name] == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize(
    "own",
    [
        OwnRefusal(tokens=TOKENS, slack=0.5, layers=(1, 4)),
        RefusalDiscriminant(tokens=TOKENS, slack=0.5, layers=(0,), score_floor=-0.5),
    ],
    ids=lambda own: own.name,
)
@torch.no_grad()
def test_a_gate_that_reads_states_decides_as_under_transformers(
    policy: Policy,
    guard: Guard,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    own: OwnRefusal | RefusalDiscriminant,
) -> None:
    """Of all criteria that read the text alone; states and logits are transformers' own."""
    shown = [text for each in shipped_anchors()[:6] for text in (each.harmful, each.harmless)]
    texts = [read_request(policy, encode_messages(processor, [user_message(t)])) for t in shown]
    states, _ = text_states(Backbone.of(model), [each.text for each in texts])
    discriminant = fit_discriminant(states[::2], states[1::2], shrinkage=0.5)
    scores = guard.policy.directions.harm_scores(states)[:, [1, 4]].mean(1)
    high = float(scores.quantile(0.7))
    mine = replace(
        policy,
        gate=(
            own,
            TextScore(layers=(1, 4), threshold=high, budget=0.1, calibrated_on=12),
            TextDiscriminant(layers=(0,), threshold=0.5, budget=0.1, calibrated_on=12),
            PaperSign(),
        ),
        discriminant=discriminant,
    )
    judge, opened = Judge(mine), set()
    assert judge.layers == mine.watched
    answers = []
    for request, read in zip(texts, states, strict=True):
        mine_read = {layer: read[layer][None] for layer in judge.layers}
        answers.append(answer_of(judge, model, request, mine_read))
    attached = guard.variant(
        gate=mine.gate,
        discriminant=discriminant,
        refusal_prefix=mine.refusal_prefix,
        response=Response.TEXT,
    )
    with attached.attach(model):
        for text, request, answer in zip(shown, texts, answers, strict=True):
            verdict = judge.receipt(request, [answer])
            inputs = chat_inputs(model, processor, [chat_of(text, noise_image(0))])
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            (receipt,) = attached.receipts
            assert [f.opened for f in verdict.findings] == [f.opened for f in receipt.findings]
            assert (verdict.guarded, verdict.reason) == (receipt.guarded, receipt.reason)
            opened |= {(f.criterion, f.opened) for f in verdict.findings}
    told = ("text_score", "text_discriminant")
    assert opened >= {(name, which) for name in told for which in (True, False)}
    with pytest.raises(ValueError, match="were read"):
        judge.receipt(texts[0], [replace(answers[0], states={})])
