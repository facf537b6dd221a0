"""States that vLLM's workers read: transformers' own, the same decisions, and each fault an error.

On the random model of `tests/`, in float32, in this process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny.pocket import IMAGE_SIDE, make_model, make_processor
from vlm_safeguard import Guard
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.engines.vllm import offline, passes
from vlm_safeguard.engines.vllm.layers import WatchedLayers
from vlm_safeguard.engines.vllm.marks import KEY
from vlm_safeguard.engines.vllm.offline import GuardedLLM, engine_options, guarded
from vlm_safeguard.engines.vllm.question import NotReadError, Question
from vlm_safeguard.engines.vllm.verdict import Judge
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.activations import image_states, text_states
from vlm_safeguard.model.backbone import Backbone, chat_inputs
from vlm_safeguard.model.conversation import chat_of, encode_chat
from vlm_safeguard.model.fingerprint import Fingerprint
from vlm_safeguard.pocket.model import save
from vlm_safeguard.policy.discriminant import fit_discriminant
from vlm_safeguard.policy.gate import ImageScore, OwnRefusal, TextDiscriminant, TextScore
from vlm_safeguard.policy.request import read_request
from vlm_safeguard.policy.response import Response

#: vLLM's options. Those with several workers have a process for each, and one for the engine.
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled, in chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "two ranks": {"enforce_eager": True, "tensor_parallel_size": 2},
    "two stages": {"pipeline_parallel_size": 2},  # eagerly, vLLM has none on a CPU
}
in_process = pytest.mark.parametrize("llm", ["eager", "compiled, in chunks"], indirect=True)
TOKENS = 6


@dataclass(frozen=True)
class Tiny:
    """A model, as transformers runs it and in a folder for vLLM, and its guard."""

    model: Any
    processor: Any
    folder: Path
    guard: Guard


def requests() -> list[str]:
    """Of several lengths, the longest of several chunks."""
    texts = [text for each in shipped_anchors()[:4] for text in (each.harmful, each.harmless)]
    return [*texts, " ".join(texts), "Why?"]


def image_of(number: int) -> Any:
    """Of the side that the model sees: vLLM resizes images by another kernel."""
    return noise_image(number).resize((IMAGE_SIDE, IMAGE_SIDE))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(folder: Path) -> Tiny:
    """A gate of every criterion that reads states; each opens for some requests, not for others."""
    processor = make_processor()
    model = make_model(processor, width=128)  # heads of 32, the least that vLLM has on a CPU
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)  # as large as states of a width of 32 are
    save(model, processor, folder)
    fitted = Guard.fit(model, processor, calibration=shipped_calibration()[:60], layers=(2, 3))
    backbone, directions = Backbone.of(model), fitted.policy.directions
    anchors = shipped_anchors()[:40]
    harmful, harmless, asked = (
        [encode_chat(processor, text) for text in texts]
        for texts in ([x.harmful for x in anchors], [x.harmless for x in anchors], requests())
    )
    states = [text_states(backbone, texts)[0] for texts in (harmful, harmless, asked)]
    discriminant = fit_discriminant(states[0], states[1], shrinkage=0.5)
    scores = directions.harm_scores(states[2])[:, [1, 4]].mean(1)
    told = discriminant.scores(states[2])[:, [0, 5]].mean(1)
    high = [float(each.quantile(0.7)) for each in (scores, told)]
    declined = int(scores.argmin())
    prefix: tuple[int, ...] = ()
    for _ in range(3):
        ids = torch.tensor([[*asked[declined], *prefix]])
        prefix += (int(model(input_ids=ids).logits[0, -1].argmax()),)
    closed = (scores <= high[0]) & (told <= high[1])
    closed[declined] = False
    images = [image_of(n) for n in range(len(asked))]
    seen = image_states(backbone, processor, requests(), images)[:, 2]
    looks = directions.harm_score(seen, 2)[closed].sort().values
    middle = len(looks) // 2
    beside = float(looks[middle - 1 : middle + 1].mean())  # between two: none is at the threshold
    likely: dict[str, Any] = {"budget": 0.1, "calibrated_on": 10}
    gate = (
        OwnRefusal(tokens=prefix[:1], slack=1.0, layers=(1, 4), score_above=1.0),
        TextScore(layers=(1, 4), threshold=high[0], **likely),
        TextDiscriminant(layers=(0, 5), threshold=high[1], **likely),
        ImageScore(layer=2, threshold=beside, **likely),
    )
    guard = fitted.variant(
        gate=gate,
        discriminant=discriminant,
        refusal_prefix=prefix,
        response=Response.REFUSAL,
    )
    return Tiny(model, processor, folder, guard)


@pytest.fixture(scope="module", params=list(ENGINES))
def llm(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: Any) -> Iterator[Any]:
    """An engine, with nothing compiled before."""
    options = ENGINES[request.param]
    own_processes = any(name.endswith("parallel_size") for name in options)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if own_processes else "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_CI_ENV": "0" if "pipeline_parallel_size" in options else "1",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM

    made = LLM(
        str(tiny.folder),
        dtype="float32",
        max_model_len=512,
        **engine_options(tiny.guard),
        **options,
    )
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def safe(llm: Any, tiny: Tiny) -> GuardedLLM:
    return guarded(llm, tiny.guard)


def params(**more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, **more)


def questions(tiny: Tiny) -> list[Question]:
    judge = Judge(tiny.guard.policy)
    texts = [encode_chat(tiny.processor, text) for text in requests()]
    return [Question.about(judge, read_request(tiny.guard.policy, text)) for text in texts]


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker


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
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": image_of(n)},
                    {"type": "text", "text": text},
                ],
            }
        ]
        for n, text in enumerate(requests())
    ]
    answers = safe.chat(messages, params(), use_tqdm=False)
    assert {receipt.guarded for receipt in safe.receipts} == {True, False}
    opened = {(f.criterion, f.opened) for receipt in safe.receipts for f in receipt.findings}
    assert len(opened) == 2 * len(tiny.guard.policy.gate)  # each opens for some, not for others
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
                    assert value == pytest.approx(own.scores[name], abs=1e-3)
            new = ids[0, inputs["input_ids"].shape[1] :].tolist()
            assert list(answer.outputs[0].token_ids) == new
            prefix = list(tiny.guard.policy.refusal_prefix)
            if own.guarded and own.scores["own_refusal"] <= 0:
                assert new[: len(prefix)] == prefix


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
