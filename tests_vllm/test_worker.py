"""States that vLLM's workers read: transformers' own, the same decisions, and each fault an error.

On the random model of `tests/`, in float32, in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.tiny_engine import (
    ENGINES,
    TOKENS,
    Tiny,
    engine,
    image_of,
    make_tiny,
    messages,
    params,
    requests,
    worker_of,
)
from vlm_safeguard.engines.vllm import offline, passes
from vlm_safeguard.engines.vllm.layers import WatchedLayers
from vlm_safeguard.engines.vllm.marks import KEY
from vlm_safeguard.engines.vllm.offline import GuardedLLM, guarded
from vlm_safeguard.engines.vllm.question import NotReadError, Question
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.activations import text_states
from vlm_safeguard.model.backbone import Backbone, chat_inputs
from vlm_safeguard.model.conversation import chat_of, encode_chat
from vlm_safeguard.model.fingerprint import Fingerprint
from vlm_safeguard.policy.request import read_request
from vlm_safeguard.policy.response import Response

pytestmark = pytest.mark.xdist_group("worker")  # they share an engine
in_process = pytest.mark.parametrize("llm", ["eager", "compiled, in chunks"], indirect=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=list(ENGINES))
def llm(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: Any) -> Iterator[Any]:
    """An engine, with nothing compiled before."""
    options = ENGINES[request.param]
    with engine(tiny, tiny.guard, tmp_path_factory.mktemp("cache"), options) as made:
        yield made


@pytest.fixture(scope="module")
def safe(llm: Any, tiny: Tiny) -> GuardedLLM:
    return guarded(llm, tiny.guard)


def questions(tiny: Tiny) -> list[Question]:
    judge = Judge(tiny.guard.policy)
    texts = [encode_chat(tiny.processor, text) for text in requests()]
    return [Question.about(judge, read_request(tiny.guard.policy, text)) for text in texts]


@torch.no_grad()
def test_states_are_those_of_transformers(llm: Any, tiny: Tiny) -> None:
    asked = questions(tiny)
    assert max(len(each.prompt) for each in asked) > 3 * 16
    texts = [each.request.text for each in asked]
    expected, _ = text_states(Backbone.of(tiny.model), texts, batch_size=4)
    for each, states in zip(offline.ask(llm, asked), expected, strict=True):
        assert sorted(each.states) == list(tiny.guard.policy.watched) == [0, 1, 2, 3, 4, 5]
        for layer, read in each.states.items():
            torch.testing.assert_close(read[0], states[layer], atol=1e-4, rtol=0)


def test_decisions_and_answers_are_those_of_transformers(safe: GuardedLLM, tiny: Tiny) -> None:
    chats = [chat_of(text, image_of(n)) for n, text in enumerate(requests())]
    answers = safe.chat(messages(len(chats)), params(), use_tqdm=False)
    assert {receipt.guarded for receipt in safe.receipts} == {True, False}
    opened = {(f.criterion, f.opened) for receipt in safe.receipts for f in receipt.findings}
    assert len(opened) == 2 * len(tiny.guard.policy.gate)  # each opens for some, not for others
    begun: set[tuple[int, ...]] = set()
    with tiny.guard.attach(tiny.model):
        for chat, answer, receipt in zip(chats, answers, safe.receipts, strict=True):
            inputs = chat_inputs(tiny.model, tiny.processor, [chat])
            ids = tiny.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            (own,) = tiny.guard.receipts
            assert receipt.guarded == own.guarded
            assert receipt.reason == own.reason
            assert receipt.policy == own.policy
            opens = {f.criterion: f.opened for f in own.findings}
            for finding in receipt.findings:
                assert finding.opened == opens[finding.criterion]
                for name, value in finding.measures.items():
                    if name != "own_refusal" or value > 0:  # below 0 it is a bound
                        assert value == pytest.approx(own.scores[name], abs=1e-3)
            new = ids[0, inputs["input_ids"].shape[1] :].tolist()
            assert list(answer.outputs[0].token_ids) == new
            if own.guarded:
                begun |= {p for p in tiny.guard.policy.prefixes if tuple(new[: len(p)]) == p}
    assert begun == set(tiny.guard.policy.prefixes)


# --- faults ---


@in_process
def test_a_request_that_went_round_the_client_is_refused(llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="through the guarded client"):
        llm.generate("A hare", params(), use_tqdm=False)


@in_process
def test_clients_cannot_mark_their_requests(safe: GuardedLLM, tiny: Tiny) -> None:
    mark = {KEY: {"policy": tiny.guard.policy.sha256()}}
    with pytest.raises(ValueError, match="not a client's to give"):
        safe.generate("A hare", params(extra_args=mark))


@in_process
def test_an_engine_of_another_policy_is_refused(llm: Any, tiny: Tiny) -> None:
    with pytest.raises(SafeguardError, match="engine_options"):
        guarded(llm, tiny.guard.variant(response=Response.TEXT))


@in_process
def test_another_models_states_are_noticed(llm: Any, tiny: Tiny) -> None:
    known = tiny.guard.fingerprint
    assert isinstance(known, Fingerprint)
    other = type(known)(**{**vars(known), "states": known.states.roll(1, 1)})
    with pytest.raises(SafeguardError, match="harm scores are off"):
        guarded(llm, tiny.guard.variant(fingerprint=other))


@in_process
def test_a_reading_that_is_gone_is_no_verdict(
    llm: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "KEPT", 1)  # the oldest ones go
    with pytest.raises(NotReadError, match="kept no states"):
        offline.ask(llm, questions(tiny)[:2])


@in_process
def test_a_reading_of_another_policy_is_no_verdict(
    llm: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(llm)
    take = worker.take_states

    def taken(names: list[str]) -> Any:
        return [each and each | {"policy": "0" * 64} for each in take(names)]

    monkeypatch.setattr(worker, "take_states", taken)
    with pytest.raises(NotReadError, match="under policy 000000000000"):
        offline.ask(llm, questions(tiny)[:1])


@in_process
def test_a_missed_layer_is_no_verdict(
    llm: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = WatchedLayers.read

    def without_one(layers: WatchedLayers, place: int) -> dict[int, torch.Tensor]:
        states = read(layers, place)
        states.popitem()
        return states

    monkeypatch.setattr(WatchedLayers, "read", without_one)
    with pytest.raises(NotReadError, match=r"\[0, 1, 2, 3, 4\] were read"):
        offline.ask(llm, questions(tiny)[:1])


@in_process
def test_a_hook_that_is_gone_is_no_verdict(llm: Any, tiny: Tiny) -> None:
    """Where passes are compiled it is in their graphs, whoever takes it off."""
    worker = worker_of(llm)
    layer = worker.get_model().get_language_model().model.layers[3]
    hooks = dict(layer._forward_hooks)
    layer._forward_hooks.clear()
    try:
        if llm.llm_engine.vllm_config.model_config.enforce_eager:
            with pytest.raises(NotReadError, match=r"layers \[3\] were not read"):
                offline.ask(llm, questions(tiny)[:1])
        else:
            assert offline.ask(llm, questions(tiny)[:1])
    finally:
        layer._forward_hooks.update(hooks)
