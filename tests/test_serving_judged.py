"""The server judges a batch first: open requests are answered with texts, closed ones go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask, with_thresholds
from support.serving import body, served, until
from tiny.pocket import make_model
from vlm_safeguard.engines.hooks.attachment import Attachment
from vlm_safeguard.engines.hooks.judgement import Judgement
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.response import Response
from vlm_safeguard.serving.answers import Answer
from vlm_safeguard.serving.jobs import Job, Waiting
from vlm_safeguard.serving.prompts import Prompt
from vlm_safeguard.serving.requests import Sampling

CHAT = "/v1/chat/completions"
NEW = 8
PREFIX = (20, 21, 22)


@pytest.fixture(scope="module")
def vlm(processor: LlavaProcessor) -> VLM:
    return VLM(make_model(processor), processor)


@pytest.fixture(scope="module")
def halved(vlm: VLM, processor: LlavaProcessor, guard: Guard) -> Guard:
    """Opens for half of the questions, by their texts; refusals begin with words of ours."""
    with with_thresholds(guard, 1e9).attach(vlm.model) as attachment:
        receipts = attachment.generate(**ask(processor, QUESTIONS), max_new_tokens=1).receipts
    scores = sorted(receipt.scores["text_score"] for receipt in receipts)
    halved = with_thresholds(guard, (scores[1] + scores[2]) / 2)
    return halved.variant(response=Response.REFUSAL, refusal_prefix=PREFIX)


Expected = Callable[..., tuple[list[str], Receipt]]


@pytest.fixture(scope="module")
def expected(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, halved: Guard
) -> Expected:
    """A question's answers and receipt by `Guard.attach` and `generate`."""

    def answer(question: str, n: int = 1, seed: int = 0, **options: Any) -> Any:
        inputs = ask(processor, [question] * n)
        given = {"max_new_tokens": NEW, "do_sample": False} | options
        torch.manual_seed(seed)
        with halved.attach(model) as attachment:
            output, receipts = attachment.generate(**inputs, **given)
        new = output[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True), receipts[0]

    return answer


@pytest.fixture(scope="module")
def sides(expected: Expected) -> tuple[list[str], list[str]]:
    """The questions whose gate is open, and the others."""
    is_open = {question: expected(question)[1].guarded for question in QUESTIONS}
    return [q for q in QUESTIONS if is_open[q]], [q for q in QUESTIONS if not is_open[q]]


def image_of(question: str) -> Any:
    """The one that `ask` shows beside it."""
    return noise_image(len(question)) if len(question) % 2 else blank_image()


class Passes:
    """What `generate` was given: rows, and whether with images; and how many images were read."""

    def __init__(self, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, bool]] = []
        self.judged: list[int] = []
        self.images = 0
        inner: Any = vlm.model
        self.handle = inner.model.vision_tower.register_forward_hook(self._look)
        generate, judge = Attachment.generate, Attachment.judge

        def generated(attachment: Attachment, **options: Any) -> Any:
            self.batches.append((len(options["input_ids"]), "pixel_values" in options))
            return generate(attachment, **options)

        def judges(attachment: Attachment, **options: Any) -> Any:
            self.judged.append(len(options["input_ids"]))
            return judge(attachment, **options)

        monkeypatch.setattr(Attachment, "generate", generated)
        monkeypatch.setattr(Attachment, "judge", judges)

    def _look(self, module: Any, args: Any, output: Any) -> None:
        self.images += len(output.last_hidden_state)


@pytest.fixture
def passes(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    watching = Passes(vlm, monkeypatch)
    yield watching
    watching.handle.remove()


def test_open_requests_share_a_batch_with_texts_and_their_images_are_not_read(
    vlm: VLM,
    halved: Guard,
    expected: Expected,
    sides: tuple[list[str], list[str]],
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (first, second), (closed, held) = sides
    steps: list[Job] = []
    add = Answer.add

    def wait(answer: Answer, token: int, ends: bool) -> None:
        """The first request's first token waits for all others to come."""
        if not steps:
            steps.append(answer.job)
            until(lambda: engine.waiting == 4)
        add(answer, token, ends)

    monkeypatch.setattr(Answer, "add", wait)
    limits: dict[str, Any] = {"max_begun": 1, "batch_wait": 0}
    with served(vlm, halved, **limits) as (client, engine), ThreadPoolExecutor(5) as pool:
        passes.batches.clear()  # the server's own request
        passes.images = 0

        before = pool.submit(client.post, CHAT, json=shown(held))
        until(lambda: bool(steps))
        sent = []
        for count, question in enumerate((first, closed, second), start=1):
            sent.append(pool.submit(client.post, CHAT, json=shown(question)))
            until(lambda count=count: engine.waiting == count)  # type: ignore[misc]
        text = pool.submit(client.post, CHAT, json=body("Which colour?"))
        told = [each.result().json() for each in (before, *sent)]
        alone = text.result().json()
        readings = engine._readings
        assert not readings.states
        assert not readings.final
    assert passes.judged == [1, 3]
    assert passes.batches == [(1, True), (1, True), (3, False)]
    assert passes.images == 2, "the closed ones'"
    for question, answer in zip((held, first, closed, second), told, strict=True):
        (content,), receipt = expected(question)
        assert answer["choices"][0]["message"]["content"] == content
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["guard"]["open"] == receipt.guarded
        assert answer["guard"]["response"] == ("refusal" if receipt.guarded else None)
        assert answer["guard"]["not_used"] == ("1 image" if receipt.guarded else None)
        counts = {
            "prompt_tokens": receipt.text_tokens + receipt.media_tokens,
            "completion_tokens": NEW,
        }
        assert counts.items() <= answer["usage"].items()
    assert alone["guard"]["not_judged"] == ["text"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_an_answer_that_is_cut_within_its_beginning(
    vlm: VLM, halved: Guard, expected: Expected, sides: tuple[list[str], list[str]], limit: int
) -> None:
    question = sides[0][0]
    (content,), _ = expected(question, max_new_tokens=limit)
    with served(vlm, halved) as (client, _):
        given = body(question, image_of(question), max_tokens=limit)
        answer = client.post(CHAT, json=given).json()
    assert answer["choices"][0]["message"]["content"] == content
    assert answer["usage"]["completion_tokens"] == limit


def test_seeds_several_answers_stops_and_streams_of_open_requests(
    vlm: VLM, halved: Guard, expected: Expected, sides: tuple[list[str], list[str]]
) -> None:
    question = sides[0][0]
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    texts, _ = expected(question, n=3, seed=7, **drawn)
    (whole,), _ = expected(question)
    with served(vlm, halved) as (client, _):

        def asked(**more: Any) -> Any:
            return client.post(CHAT, json=body(question, image_of(question), **more))

        answer = asked(temperature=1.5, seed=7, n=3, max_tokens=NEW).json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == texts
        assert len(set(texts)) > 1
        assert answer["usage"]["completion_tokens"] == 3 * NEW
        for stop in (whole[1:3], whole[-3:-1]):  # in the words it begins with, and behind them
            cut = asked(stop=[stop], max_tokens=NEW).json()["choices"][0]
            assert cut["message"]["content"] == whole[: whole.index(stop)]
            assert cut["finish_reason"] == "stop"
        streamed = asked(stream=True, max_tokens=NEW)
        assert streamed.headers["x-guard"].startswith("open; by=text_score; response=refusal")


def test_a_fault_while_judging_is_tried_again_alone_and_then_is_an_error(
    vlm: VLM,
    halved: Guard,
    expected: Expected,
    sides: tuple[list[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Out of memory, say, where two are judged at once, and once more for one of them."""
    (bad, fine), _ = sides
    tokens = expected(bad)[1].text_tokens
    judge = Attachment.judge

    def scarce(attachment: Attachment, **options: Any) -> Any:
        judged = judge(attachment, **options)
        if len(judged) > 1 or judged[0].receipt.text_tokens == tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return judged

    with served(vlm, halved, batch_wait=1.0) as (client, engine), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(Attachment, "judge", scarce)
        failed, answered = pool.map(lambda q: client.post(CHAT, json=shown(q)), (bad, fine))
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "guard_fault")
        assert "choices" not in failed.text
        assert answered.json()["choices"][0]["message"]["content"] == expected(fine)[0][0]
        until(lambda: engine.faults >= 2)
        until(lambda: not engine._readings.states)
        assert client.get("/health").status_code == 200


def test_an_open_request_whose_batch_fails_is_tried_again_from_its_text(
    vlm: VLM,
    halved: Guard,
    expected: Expected,
    sides: tuple[list[str], list[str]],
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = Attachment.generate

    def scarce(attachment: Attachment, **options: Any) -> Any:
        if len(options["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(attachment, **options)

    with served(vlm, halved, batch_wait=1.0) as (client, engine), ThreadPoolExecutor(2) as pool:
        passes.images = 0
        monkeypatch.setattr(Attachment, "generate", scarce)
        answers = list(pool.map(lambda q: client.post(CHAT, json=shown(q)).json(), sides[0]))
        assert engine.faults == 1
    assert passes.judged == [2]
    assert passes.images == 0
    for question, answer in zip(sides[0], answers, strict=True):
        assert answer["choices"][0]["message"]["content"] == expected(question)[0][0]
        assert answer["guard"]["open"]


def test_verdicts_alone_are_of_texts_alone(
    vlm: VLM, halved: Guard, expected: Expected, passes: Passes
) -> None:
    with served(vlm, halved) as (client, _):
        passes.batches.clear()
        passes.images = 0
        told = client.post("/v1/moderations", json={"input": list(QUESTIONS)}).json()["results"]
    assert passes.batches == []
    assert passes.images == 0
    assert [each["flagged"] for each in told] == [expected(q)[1].guarded for q in QUESTIONS]


def test_where_the_gate_looks_at_the_image_nothing_is_judged_before_it(
    vlm: VLM, halved: Guard, sides: tuple[list[str], list[str]], passes: Passes
) -> None:
    looks = with_thresholds(halved, 1e9, image=-1e9)
    question = sides[1][0]
    with served(vlm, looks) as (client, _):
        answer = client.post(CHAT, json=shown(question)).json()
        verdict = client.post("/v1/moderations", json={"input": question}).json()
    assert answer["guard"]["by"] == "image_score"
    assert answer["usage"]["completion_tokens"] == NEW
    assert verdict["results"][0]["flagged"]
    assert passes.judged == []


def shown(question: str) -> dict[str, Any]:
    """It is asked beside its image."""
    return body(question, image_of(question), max_tokens=NEW)


# --- jobs that are put back ---


def job_of(name: str, *, images: bool = True) -> Job:
    shown = (blank_image(),) if images else ()
    prompt = Prompt(name, shown, (1, 2, 3))
    return Job(prompt, Sampling(temperature=0.0), 1, 4, (), send=lambda event: None)


def test_what_is_put_back_comes_first_and_shares_a_batch_with_texts(
    expected: Expected, sides: tuple[list[str], list[str]]
) -> None:
    receipt = expected(sides[0][0])[1]
    waiting = Waiting(8, 0.0)
    image, text = job_of("image"), job_of("text", images=False)
    first, second, gone = (job_of(name) for name in ("first", "second", "gone"))
    for job in (image, text):
        waiting.put(job)
    for job in (first, second, gone):
        assert job.reads_images
        job.opened = Judgement(receipt, (1, 3), PREFIX)
        assert (job.reads_images, job.ids, job.beginning) == (False, (1, 3), PREFIX)
    waiting.close()  # what was taken is answered
    waiting.put_back([first, second, gone])
    gone.cancelled = True
    assert waiting.batch(wait=True) == [first, second, text]
    assert waiting.batch(wait=True) == [image]
    assert waiting.batch(wait=True) == []
