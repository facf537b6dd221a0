"""The text-only pass: what it reads, once, and that it lets nothing through it could not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.observe import decoder_passes
from support.reference import QUESTIONS, ask, run_row, text_ids, with_thresholds
from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.engines.hooks.reader import TextReader
from vlm_safeguard.engines.hooks.text_passes import TextReadings
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.sentences import learn_sentences
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.response import Response

pytestmark = pytest.mark.versions

Model = LlavaForConditionalGeneration


def text_reader(
    model: Model, policy: Policy, readings: TextReadings | None = None
) -> tuple[TextReader, LayerHooks]:
    backbone = Backbone.of(model)
    hooks = LayerHooks(backbone)
    subspaces = policy.subspaces(backbone.device, model.dtype)
    reader = TextReader(
        policy, backbone, hooks, policy.directions, subspaces, policy.discriminant, readings
    )
    return reader, hooks


def read(
    policy: Policy,
    processor: LlavaProcessor,
    images: list[bool],
    questions: Sequence[str] = QUESTIONS,
) -> Batch:
    inputs = ask(processor, questions, images=images)
    return Batch.read(policy, inputs["input_ids"], inputs["attention_mask"])


@torch.no_grad()
def test_coordinates_and_scores_are_those_of_the_text_alone(
    exact_model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """Of requests with an image; one without is not read, and its coordinates are zero."""
    images = [True, False, True, True]
    prefix = (17, 23)
    policy = with_thresholds(guard, 0.0, image=9.0, tokens=(17,)).variant(refusal_prefix=prefix)
    batch = read(policy.policy, processor, images)
    reader, _ = text_reader(exact_model, policy.policy)
    reader.ask(batch)
    assert batch.decision.awaits_image
    start = 0
    for row, question in enumerate(QUESTIONS):
        words = text_ids(processor, question)
        states, logits = run_row(exact_model, [*words, *prefix])
        for layer, subspace in reader.subspaces.items():
            found = batch.coordinates[layer][start : start + len(words) + len(prefix)]
            wanted = states[layer].to(subspace.V.dtype) @ subspace.V.mT
            if not images[row]:
                wanted = torch.zeros_like(wanted)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        start += len(words) + len(prefix)
        findings = batch.decision.findings[row]
        assert bool(findings) == images[row]
        if images[row]:
            last = logits[len(words) - 1]
            others = torch.cat([last[:17], last[18:]])
            margin = float(last[17] - others.max())
            assert findings[0].measures["own_refusal"] == pytest.approx(margin, abs=1e-4)


def test_a_text_is_read_once_and_kept(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    kept = TextReadings()
    reader, hooks = text_reader(model, guard.policy, kept)
    wide = replace(guard.policy, layers=(1, 2, 3))
    wider, _ = text_reader(model, wide, kept)
    with decoder_passes(model) as passes:
        for _ in range(2):
            reader.ask(read(guard.policy, processor, [True] * 4))
        assert [rows for rows, _ in passes] == [4]
        assert not hooks.in_pass
        wider.ask(read(wide, processor, [True] * 4))  # a layer that was not watched before
        assert [rows for rows, _ in passes] == [4, 4]


def test_states_of_all_tokens_are_kept_only_where_edits_aim_at_them(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """And guards that share their readings read what the other one left out."""
    kept = TextReadings()
    answers, edits = (
        replace(guard.policy, response=each) for each in (Response.TEXT, Response.EDIT)
    )
    for policy, passes_made, every_token in (
        (answers, 1, False),
        (edits, 1, True),
        (answers, 0, True),
    ):
        reader, _ = text_reader(model, policy, kept)
        with decoder_passes(model) as passes:
            reader.ask(read(policy, processor, [True] * 4))
        assert len(passes) == passes_made
        for text, states in kept.states.items():
            assert {len(each) for each in states.values()} == {len(text) if every_token else 1}


def test_a_hook_that_does_not_fire_is_an_error_and_leaves_no_hooks(
    model: Model, processor: LlavaProcessor, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, hooks = text_reader(model, guard.policy)
    batch = read(guard.policy, processor, [True] * 4)
    layer = reader.backbone.layers[3]
    before = dict(layer._forward_hooks)
    monkeypatch.setattr(layer, "register_forward_hook", lambda *a, **k: _Gone())
    with pytest.raises(SafeguardError, match=r"only \[2\] took part in the text-only pass"):
        reader.ask(batch)
    assert not hooks.in_pass
    assert dict(layer._forward_hooks) == before


class _Gone:
    """A handle of a hook that was never put on."""

    def remove(self) -> None:
        """Nothing to remove."""


def test_the_words_of_a_refusal_are_not_read_behind_a_sentence_alone(
    exact_model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """Its first token is; behind the texts whole they are, though all of them would decide."""
    everything = tuple(range(exact_model.config.text_config.vocab_size - 1))
    policy = with_thresholds(guard, 1e9, tokens=everything).policy
    own, prompt = policy.criterion(OwnRefusal), policy.generation_prompt
    assert own is not None
    assert prompt is not None
    policy = replace(
        policy.with_criterion(own.model_copy(update={"score_floor": -1e9, "score_above": 1e9})),
        response=Response.TEXT,
        refusal_prefix=(17, 23),
        sentences=learn_sentences(processor, prompt, 2, 16),
    )
    reader, _ = text_reader(exact_model, policy)
    batch = read(policy, processor, [True] * 4, ["Swim? Dive?"] * 4)
    parts = len(policy.judged(batch.texts[0])) - 1
    assert parts > 1
    with decoder_passes(exact_model) as passes:
        reader.ask(batch)
    assert [rows for rows, _ in passes] == [1, 1, parts, 1]  # first what all begin with


@pytest.mark.parametrize("high", [True, False])
def test_the_words_of_a_refusal_are_read_where_its_first_token_leads_and_the_score_is_high(
    exact_model: Model, processor: LlavaProcessor, guard: Guard, high: bool
) -> None:
    """Against the margins of a pass of its own; and nowhere else, where nothing is edited there.

    The words are those that begin with that token.
    """
    first = [
        int(run_row(exact_model, text_ids(processor, question))[1][-1].argmax())
        for question in QUESTIONS
    ]
    other = next(token for token in first if token != first[0])
    prefixes = {first[0]: (first[0], 23), other: (other, 19, 21)}
    asked = with_thresholds(guard, 1e9, tokens=tuple(prefixes)).policy
    asked = replace(
        asked,
        refusal_prefix=prefixes[first[0]],
        other_prefixes=(prefixes[other],),
        response=Response.TEXT,
    )
    own = asked.criterion(OwnRefusal)
    assert own is not None
    bounds = {"score_floor": -1e9 if high else 1e9, "score_above": 1e9}
    asked = asked.with_criterion(own.model_copy(update=bounds))
    reader, _ = text_reader(exact_model, asked)
    batch = read(asked, processor, [True] * 4)
    with decoder_passes(exact_model) as passes:
        reader.ask(batch)
    longest = max(len(text_ids(processor, question)) for question in QUESTIONS)
    behind = [(first.count(token), len(prefix)) for token, prefix in prefixes.items()]
    assert sum(rows for rows, _ in behind) < len(QUESTIONS)
    assert passes == [(len(QUESTIONS), longest), *(behind if high else [])]
    for question, token, findings in zip(QUESTIONS, first, batch.decision.findings, strict=True):
        measures = findings[0].measures
        assert (measures["own_refusal"] > 0) == (token in prefixes)
        assert ("own_opening" in measures) == (high and token in prefixes)
        if "own_opening" in measures:
            prefix = prefixes[token]
            _, logits = run_row(exact_model, [*text_ids(processor, question), *prefix])
            leads = []
            for place, said in zip(range(-1 - len(prefix), -1), prefix, strict=True):
                others = torch.cat([logits[place][:said], logits[place][said + 1 :]])
                leads.append(float(logits[place][said] - others.max()))
            assert measures["own_opening"] == pytest.approx(min(leads), abs=1e-4)
