"""Faults while serving: an error, seen in /health, and never an unguarded token."""

from __future__ import annotations

import json
import logging
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask
from support.serving import body, keep_logs_apart, served, settings, until
from tiny.pocket import make_model
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.edits import Refuse
from vlm_safeguard.policy.span import Span
from vlm_safeguard.serving.answers import Answer
from vlm_safeguard.serving.app import make_app
from vlm_safeguard.serving.logs import JsonFormatter, log_to_stderr, request_id
from vlm_safeguard.serving.prompts import Writer

CHAT = "/v1/chat/completions"
QUESTION = QUESTIONS[0]
IMAGE = noise_image(len(QUESTION))


@pytest.fixture
def vlm(processor: LlavaProcessor) -> VLM:
    return VLM(make_model(processor), processor)


def chunks_of(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if "{" in line]


@pytest.mark.parametrize("stream", [True, False])
def test_a_hook_torn_off_while_it_answers_is_an_error_and_no_token_more(
    vlm: VLM,
    open_guard: Guard,
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    """Every token of the answer is edited, so that a lost hook is noticed at the next one."""
    guard = open_guard.variant(edit=Refuse(span=Span.ANSWER))
    inputs = ask(processor, [QUESTION])
    with guard.attach(model):
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    expected = ids[inputs["input_ids"].shape[1] :].tolist()
    served_model: Any = vlm.model
    torn = served_model.model.language_model.layers[2]
    given: list[int] = []
    add = Answer.add

    class Lost(OrderedDict[int, Any]):
        """Hooks that are put on do not stay."""

        def __setitem__(self, key: int, value: Any) -> None:
            return

    def tear(answer: Answer, token: int, ends: bool) -> None:
        add(answer, token, ends)
        given.append(token)
        if len(given) == 3:
            torn._forward_hooks = Lost()

    with served(vlm, guard) as (client, engine):
        monkeypatch.setattr(Answer, "add", tear)
        answer = client.post(CHAT, json=body(QUESTION, IMAGE, max_tokens=20, stream=stream))
        until(lambda: not engine.healthy)
        if stream:
            *pieces, last = chunks_of(answer.text)
            assert last["error"]["code"] == "guard_fault"
            assert "[DONE]" not in answer.text
            assert vlm.processor.decode(expected[:3]).startswith(text_of(pieces))
        else:
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "guard_fault"
            assert "choices" not in answer.text
        assert given == expected[:3]
        monkeypatch.setattr(Answer, "add", add)

        health, ready = client.get("/health"), client.get("/ready")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert health.json()["faults"] >= 1
        assert ready.status_code == 503
        again = client.post(CHAT, json=body(QUESTION, IMAGE))
        assert again.status_code == 500
        assert "choices" not in again.text
        torn._forward_hooks = OrderedDict()
        assert client.post(CHAT, json=body(QUESTION, IMAGE)).status_code == 200
        assert client.get("/health").status_code == 200


def test_one_bad_request_harms_no_other_of_its_batch(
    vlm: VLM, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, say, where two are encoded at once, and once more for one of them."""
    encode = Writer.encode

    def scarce(writer: Writer, prompts: Any) -> Any:
        if any("steal" in prompt.text for prompt in prompts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(writer, prompts)

    with served(vlm, guard, batch_wait=1.0) as (client, engine):
        monkeypatch.setattr(Writer, "encode", scarce)
        with ThreadPoolExecutor(2) as pool:
            answers = [
                pool.submit(client.post, CHAT, json=body(question, IMAGE))
                for question in ("How to swim", "How to steal a car")
            ]
            fine, bad = (each.result() for each in answers)
        assert fine.status_code == 200
        assert bad.status_code == 500
        assert "memory" not in bad.text
        until(lambda: engine.faults >= 1)
        health = client.get("/health")
        assert health.status_code == 200, "other requests are guarded"
        assert health.json()["faults"] == engine.faults
        assert f"vlm_safeguard_faults_total {float(engine.faults)}" in client.get("/metrics").text


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_out_of_memory_in_a_pass_is_an_error_and_no_token_more(
    vlm: VLM, open_guard: Guard, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """In the text's, in the prompt's or while it answers; the next request is answered again."""
    layer: Any = Backbone.of(vlm.model).layers[3]
    forward, made = layer.forward, [0]

    def scarce(*args: Any, **options: Any) -> Any:
        made[0] += 1
        if made[0] > passes:
            raise torch.OutOfMemoryError("CUDA out of memory: /srv/models")
        return forward(*args, **options)

    given = body(QUESTION, IMAGE, max_tokens=8, stream=True)
    with served(vlm, open_guard) as (client, engine):
        whole = client.post(CHAT, json=given)
        monkeypatch.setattr(layer, "forward", scarce)
        cut = client.post(CHAT, json=given)
        until(lambda: engine.faults >= 1)
        monkeypatch.setattr(layer, "forward", forward)
        again = client.post(CHAT, json=given)
        assert client.get("/health").status_code == 200
    assert "[DONE]" not in cut.text
    assert "memory" not in cut.text
    told = chunks_of(cut.text)
    assert (told[-1] if passes > 2 else cut.json())["error"]["code"] == "guard_fault"
    assert len(text_of(told)) < len(text_of(chunks_of(whole.text)))
    assert text_of(chunks_of(whole.text)).startswith(text_of(told))
    assert text_of(chunks_of(again.text)) == text_of(chunks_of(whole.text))


def text_of(chunks: list[Any]) -> str:
    """What chunks of a stream say together."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk.get("choices", [])
    )


def test_a_mistake_of_ours_is_one_sentence(
    vlm: VLM, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(vlm, guard) as (client, _):
        monkeypatch.setattr("vlm_safeguard.serving.answering._check", broken_by("secret /srv"))
        answer = client.post(CHAT, json=body(QUESTION))
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal"
        assert "secret" not in answer.text


def broken_by(words: str) -> Any:
    """A function that raises an error of these words."""

    def broken(*_: Any) -> None:
        raise RuntimeError(words)

    return broken


@pytest.mark.parametrize("where", ["load", "attach", "verify"])
def test_nothing_is_served_where_the_guard_is_not_on(
    vlm: VLM, guard: Guard, processor: LlavaProcessor, where: str
) -> None:
    """Not ready, every request is sent away, and the thread says why it ended."""
    over: list[bool] = []

    def load() -> tuple[VLM, Guard]:
        if where == "load":
            raise OSError("no such disk")
        if where == "attach":
            return VLM(make_model(processor, seed=5), processor), guard
        served_model: Any = vlm.model
        layer = served_model.model.language_model.layers[2]
        layer.__class__ = type(
            "Direct", (type(layer),), {"__call__": type(layer).forward}
        )  # hooks do not fire
        return vlm, guard

    app, engine = make_app(settings(), load, lambda: over.append(True))
    with TestClient(app) as client:
        until(lambda: bool(over))
        assert engine.failure
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 503
        answer = client.post(CHAT, json=body(QUESTION, IMAGE))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert client.post("/v1/moderations", json={"input": "x"}).status_code == 503


def test_neither_metrics_nor_logs_hold_a_prompt(
    vlm: VLM, guard: Guard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of requests that are wrong either, nor of errors whose messages quote them."""
    marker = "zanzibar"
    caplog.set_level(logging.DEBUG)

    def quoting(writer: Writer, prompts: Any) -> Any:
        raise RuntimeError(f"cannot encode {prompts[0].text}")

    with served(vlm, guard) as (client, _):
        for given in (
            body(f"{marker} bake", IMAGE),
            body(f"{marker} bake", IMAGE, stream=True),
            body(f"{marker} <image>"),
            body("x", **{marker: 1}),
            body("x", model=marker),
        ):
            client.post(CHAT, json=given, headers={"x-request-id": "mine-1"})
        client.post("/v1/moderations", json={"input": marker})
        client.post("/v1/responses", json={"model": "tiny", "input": marker, "tools": marker})
        client.get(f"/{marker}")
        metrics = client.get("/metrics").text
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "encode", quoting)
            failed = client.post(CHAT, json=body(f"{marker} bake", IMAGE))
        with monkeypatch.context() as patch:
            patch.setattr("vlm_safeguard.serving.answering._check", broken_by(marker))
            wrong = client.post(CHAT, json=body(f"{marker} bake", IMAGE))
    assert (failed.status_code, wrong.status_code) == (500, 500)
    assert marker not in failed.text + wrong.text
    assert 'vlm_safeguard_gate_total{criterion="",decision="closed"}' in metrics
    assert 'vlm_safeguard_tokens_total{kind="completion"} 8.0' in metrics
    assert marker not in metrics
    lines = [
        JsonFormatter().format(record)
        for record in caplog.records
        if record.name.startswith("vlm_safeguard")
    ]
    for event in ("answered", "fault", "failed"):
        assert any(f'"event": "{event}"' in line for line in lines)
    assert not any(marker in line for line in lines)
    assert not any("base64" in line for line in lines)


def test_a_full_disk_for_logs_harms_no_answer(
    vlm: VLM, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_logs_apart(monkeypatch)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        log_to_stderr()
        print("x" * 100_000, file=sys.stderr, flush=True)
        with served(vlm, guard) as (client, engine):
            for stream in (False, True):
                answer = client.post(CHAT, json=body(QUESTION, IMAGE, stream=stream))
                assert answer.status_code == 200
                assert '"guard"' in answer.text
            assert engine.faults == 0
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_an_error_in_a_log_is_its_kind_and_place() -> None:
    name = request_id.set("mine-2")
    try:
        raise ValueError("a prompt")
    except ValueError as error:
        given = (ValueError, error, error.__traceback__)
        record = logging.getLogger("x").makeRecord(
            "x", logging.ERROR, __file__, 1, "failed", (), given, extra={"kind": "ValueError"}
        )
    finally:
        request_id.reset(name)
    line = json.loads(JsonFormatter().format(record))
    assert line["kind"] == "ValueError"
    assert "a prompt" not in str(line)
