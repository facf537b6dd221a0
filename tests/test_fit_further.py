"""A gate whose text criterion is a discriminant, fitted on further forms of requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask, run_row, text_ids
from tiny.pocket import make_processor
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.fit import further, own_decision
from vlm_safeguard.forms import (
    FollowUp,
    Ordinary,
    Pair,
    further_calibration,
    further_pairs,
    shipped_anchors_by_language,
    shipped_calibration_by_language,
    shipped_follow_up_anchors,
    shipped_follow_up_calibration,
    shipped_wrappers,
)
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_chat, takes_turns
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.pocket.architecture import CHAT_TEMPLATE
from vlm_safeguard.policy.calibration import OwnDecision
from vlm_safeguard.policy.discriminant import Discriminant, fit_discriminant
from vlm_safeguard.policy.gate import TextDiscriminant, TextScore
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.soundness import check_sound

Model = LlavaForConditionalGeneration
ANCHORS = shipped_anchors()[:8]
ORDINARY = shipped_calibration()[:21]
WRAPPERS, FOLDS = shipped_wrappers(), FitOptions().folds
FEW = 3  # of each language's and of the follow-ups


@pytest.fixture(scope="module")
def told(exact_model: Model, processor: LlavaProcessor) -> Guard:
    with pytest.MonkeyPatch.context() as patch:
        pairs, ordinary = few_pairs(), few_requests()
        patch.setattr(further, "further_pairs", lambda *_: pairs)
        patch.setattr(further, "further_calibration", lambda *_: ordinary)
        return Guard.fit(
            exact_model,
            processor,
            anchors=ANCHORS,
            calibration=ORDINARY,
            gate="discriminant",
            budget=0.2,
            rank=4,
        )


def few_pairs() -> list[Pair]:
    every = further_pairs(ANCHORS, WRAPPERS, 1, FOLDS)
    spanish = [pair for pair in every if pair.language == "Spanish"]
    turns = [pair for pair in every if isinstance(pair.harmful, FollowUp)]
    return [*every[: len(ANCHORS)], *spanish[:FEW], *turns[:FEW]]


def few_requests() -> list[Ordinary]:
    every = further_calibration(ORDINARY, WRAPPERS, FOLDS)
    return [*every[: len(ORDINARY)], *every[-FEW:]]


def criterion(guard: Guard) -> TextDiscriminant:
    chosen = guard.policy.criterion(TextDiscriminant)
    assert chosen is not None
    assert guard.policy.criterion(TextScore) is None
    return chosen


def test_it_is_fitted_on_all_forms_and_calibrated_on_all(
    told: Guard, exact_model: Model, processor: LlavaProcessor
) -> None:
    """The discriminant, computed again from single texts read one by one.

    The calibration requests' sentences are among the harmless texts; a request scores as the
    highest of its texts does.
    """
    pairs = [Pair(a.harmful, a.harmless, n) for n, a in enumerate(ANCHORS)] + few_pairs()
    ordinary = [Ordinary(text, n) for n, text in enumerate(ORDINARY)] + few_requests()
    whole = [ids_of(processor, each.request) for each in ordinary]
    alone = [told.policy.judged(tuple(ids))[1:] for ids in whole]
    assert sum(map(bool, alone)) > FEW
    owners = [*range(len(ordinary)), *(n for n, each in enumerate(alone) for _ in each)]
    topics = [[each.topic for each in pairs], [ordinary[owner].topic for owner in owners]]
    folds = [torch.tensor(side) % FOLDS for side in topics]
    harmless = [ids_of(processor, pair.harmless) for pair in pairs]
    texts: list[list[Sequence[int]]] = [
        [ids_of(processor, pair.harmful) for pair in pairs],
        [*harmless, *whole, *(part for each in alone for part in each)],
    ]
    states = [torch.stack([last_states(exact_model, ids) for ids in side]) for side in texts]
    chosen, made = criterion(told), told.policy.discriminant
    assert made is not None
    assert told.provenance.options is not None
    fitted = {
        shrinkage: fit_discriminant(states[0], states[1], shrinkage)
        for shrinkage in told.provenance.options.shrinkages
    }
    alike = [
        share
        for share, each in fitted.items()
        if torch.allclose(each.weights, made.weights, rtol=1e-3, atol=1e-5)
    ]
    assert len(alike) == 1
    scores, judged = torch.empty(len(owners)), states[1][len(pairs) :]
    for fold in range(FOLDS):
        out = folds[1] == fold
        harmless_folds = torch.cat([folds[0], folds[1]])
        unseen = fit_discriminant(
            states[0][folds[0] != fold], states[1][harmless_folds != fold], alike[0]
        )
        scores[out] = unseen.scores(judged[out])[:, list(chosen.layers)].mean(1)
    scores = torch.stack([scores[torch.tensor(owners) == n].max() for n in range(len(ordinary))])
    torch.testing.assert_close(told.scores["calibration"], scores, rtol=0, atol=1e-3)
    assert chosen.calibrated_on == len(ordinary)
    for part in (scores[: len(ORDINARY)], scores[len(ORDINARY) :]):
        opened = int((part > chosen.threshold).sum())
        assert opened < math.floor(chosen.budget * (len(part) + 1)) + 1


def ids_of(processor: LlavaProcessor, request: str | FollowUp) -> list[int]:
    """Of a request, ready for the answer."""
    if isinstance(request, str):
        return list(encode_chat(processor, request))
    return turn_ids(processor, request)


def last_states(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """(layers, hidden) of the last token, of a text without hooks of ours."""
    states, _ = run_row(model, ids)
    return torch.stack([layer[-1] for layer in states]).float()


def turn_ids(processor: LlavaProcessor, turn: FollowUp) -> list[int]:
    """As the chat template writes three turns, by its own text."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", turn.first), ("assistant", turn.answer), ("user", turn.request))
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_its_decision_is_one_dot_product_a_layer(
    told: Guard, exact_model: Model, processor: LlavaProcessor
) -> None:
    chosen, made = criterion(told), told.policy.discriminant
    assert made is not None
    scores = []
    for question in QUESTIONS:
        states, _ = run_row(exact_model, text_ids(processor, question))
        each = [
            float(states[layer][-1].float() @ made.weights[layer] - made.offset[layer])
            for layer in chosen.layers
        ]
        scores.append(sum(each) / len(each))
    middle = sum(sorted(scores)[1:3]) / 2
    gate = (chosen.model_copy(update={"threshold": middle}),)
    guard = told.variant(gate=gate)
    with guard.attach(exact_model) as attachment:
        receipts = attachment.generate(**ask(processor, QUESTIONS), max_new_tokens=1).receipts
    for receipt, score in zip(receipts, scores, strict=True):
        assert receipt.scores["discriminant"] == pytest.approx(score, abs=1e-4)
        assert receipt.guarded == (score > middle)
        assert "the discriminant gives the text" in receipt.reason


def test_it_is_kept(told: Guard, tmp_path: Path) -> None:
    told.save_pretrained(tmp_path)
    again = Guard.from_pretrained(tmp_path)
    assert again.policy.sha256() == told.policy.sha256()
    assert again.policy.discriminant is not None
    assert told.policy.discriminant is not None
    assert torch.equal(again.policy.discriminant.weights, told.policy.discriminant.weights)
    moved = replace(told.policy.discriminant, weights=told.policy.discriminant.weights + 1e-3)
    assert told.variant(discriminant=moved).policy.sha256() != told.policy.sha256()


@pytest.mark.parametrize("broken", ["none", "narrow", "not finite", "offset"])
def test_one_that_cannot_be_is_refused(told: Guard, broken: str) -> None:
    made = told.policy.discriminant
    assert made is not None
    changed: dict[str, Discriminant | None] = {
        "none": None,
        "narrow": replace(made, weights=made.weights[:, 1:]),
        "not finite": replace(made, weights=made.weights * torch.inf),
        "offset": replace(made, offset=made.offset[1:]),
    }
    with pytest.raises(SafeguardError, match="discriminant"):
        check_sound(told.variant(discriminant=changed[broken]).policy)


# --- the forms ---


def test_both_requests_of_a_pair_are_in_one_wrapper_and_a_topic_is_in_several() -> None:
    pairs = further_pairs(ANCHORS, WRAPPERS, 2, FOLDS)
    for number, pair in enumerate(pairs[: 2 * len(ANCHORS)]):
        anchor = ANCHORS[number // 2]
        assert pair.topic == number // 2
        assert isinstance(pair.harmful, str)
        assert pair.harmful.replace(anchor.harmful, anchor.harmless) == pair.harmless
    wrappers = {str(pair.harmful).replace(ANCHORS[pair.topic].harmful, "") for pair in pairs[:16]}
    assert len(wrappers) == 16
    rest = pairs[2 * len(ANCHORS) :]
    languages = {pair.language for pair in rest} - {"English"}
    assert languages == set(shipped_anchors_by_language())
    topics = {(pair.topic, pair.language) for pair in rest}
    assert len(topics) == len(rest)
    assert not {pair.topic for pair in rest} & {pair.topic for pair in pairs[:16]}
    assert len([p for p in rest if isinstance(p.harmful, FollowUp)]) == len(
        shipped_follow_up_anchors()
    )


def test_calibration_is_in_wrappers_in_other_languages_and_in_second_turns() -> None:
    requests = further_calibration(ORDINARY, WRAPPERS, FOLDS)
    foreign = sum(map(len, shipped_calibration_by_language().values()))
    turns = shipped_follow_up_calibration()
    assert len(requests) == len(ORDINARY) + foreign + len(turns)
    assert [each.request for each in requests[-len(turns) :]] == turns
    for number, text in enumerate(ORDINARY):
        assert requests[number].topic == number
        assert text in str(requests[number].request)
    assert further_calibration(ORDINARY, [], FOLDS) == requests[len(ORDINARY) :]


def test_a_fold_shares_neither_topic_nor_wrapper_with_another() -> None:
    """So that a request is scored by discriminants that have seen neither."""
    anchors, calibration = shipped_anchors(), shipped_calibration()
    pairs = further_pairs(anchors, WRAPPERS, 2, FOLDS)[: 2 * len(anchors)]
    requests = further_calibration(calibration, WRAPPERS, FOLDS)[: len(calibration)]
    wrappers = [set[str]() for _ in range(FOLDS)]
    around = {}
    for pair in pairs:
        around[pair.topic, str(pair.harmful)] = anchors[pair.topic].harmful
    for each in requests:
        around[each.topic, str(each.request)] = calibration[each.topic]
    for (topic, whole), text in around.items():
        wrappers[topic % FOLDS].add(whole.replace(text, "{request}"))
    assert sum(map(len, wrappers)) == len(set().union(*wrappers))
    assert set().union(*wrappers) == {wrapper.text for wrapper in WRAPPERS}


# --- refusals in other languages ---


def test_tokens_that_open_refusals_of_one_language_are_learnt(
    told: Guard, exact_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that opens its refusals with another token in Spanish; in English it is unchanged.

    And so are the words that those begin with.
    """
    backbone = Backbone.of(exact_model)
    pairs = few_pairs()
    english, spanish = 40, 50
    states = {side: torch.zeros(len(pairs), 3) for side in ("harmful", "harmless")}
    for row, pair in enumerate(pairs):
        states["harmful"][row, 1 if pair.language == "Spanish" else 0] = 1.0

    def logits(self: Backbone, rows: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(len(rows), 60)
        made[:, 7] = 5.0
        made[:, english] = 20 * rows[:, 0]
        made[:, spanish] = 20 * rows[:, 1]
        return made

    def words(
        of: Backbone, read: TextPass, prompts: list[tuple[int, ...]], longest: int
    ) -> tuple[int, ...]:
        assert prompts == [(row,) for row, pair in enumerate(pairs) if pair.language == "Spanish"]
        return spanish, 51

    monkeypatch.setattr(Backbone, "next_token_logits", logits)
    monkeypatch.setattr(further, "refusal_prefix", words)
    alone = OwnDecision((english,), (), 0.0)
    options = told.provenance.options
    assert options is not None
    finals = (states["harmful"], states["harmless"], torch.zeros(0, 3))
    rows = [[row] for row in range(len(pairs))]
    own = further._in_all_languages(backbone, pairs, rows, finals, alone, options)
    assert own.tokens == (english, spanish)
    assert own.other_prefixes == ((spanish, 51),)


def test_a_processor_of_one_turn_is_fitted_for_without_second_turns(
    exact_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its template raises where an answer is gone on behind."""
    one_turn = make_processor(
        "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + CHAT_TEMPLATE
    )
    assert takes_turns(make_processor())
    assert not takes_turns(one_turn)
    monkeypatch.setattr(further, "further_pairs", lambda *_: few_pairs())
    monkeypatch.setattr(further, "further_calibration", lambda *_: few_requests())
    with pytest.warns(UserWarning, match="without requests as second turns"):
        fitted = Guard.fit(
            exact_model, one_turn, anchors=ANCHORS, calibration=ORDINARY, budget=0.2, rank=4
        )
    plain = [pair for pair in few_pairs() if isinstance(pair.harmful, str)]
    assert len(plain) < len(few_pairs())
    assert len(fitted.scores["harmful"]) == len(ANCHORS) + len(plain)


def test_fitting_keeps_no_graph_of_any_pass(
    exact_model: Model, processor: LlavaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def likeliest(backbone: Backbone, harmful: torch.Tensor, *_: object) -> tuple[int, ...]:
        return tuple(set(backbone.next_token_logits(harmful).argmax(-1).tolist()))

    monkeypatch.setattr(own_decision, "refusal_tokens", likeliest)  # so all anchors are refused
    graded = []
    layer = Backbone.of(exact_model).layers[0]
    handle = layer.register_forward_hook(lambda *_: graded.append(torch.is_grad_enabled()))
    try:
        guard = Guard.fit(
            exact_model,
            processor,
            anchors=ANCHORS,
            calibration=ORDINARY,
            gate="calibrated",
            budget=0.2,
            rank=4,
            refusal_contrast=0.0,
        )
    finally:
        handle.remove()
    assert guard.policy.own_refusal is not None
    assert graded
    assert not any(graded)
