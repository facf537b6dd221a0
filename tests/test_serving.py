"""The server through the official client: answers, streams, receipts, batches, leaving."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from PIL.Image import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask, with_thresholds
from support.serving import NAME, body, listening, openai_client, said, served, until
from tiny.pocket import make_model
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.response import Response
from vlm_safeguard.serving.answers import Answer
from vlm_safeguard.serving.engine import Engine

Model = LlavaForConditionalGeneration
NEW = 12


@pytest.fixture(scope="module")
def vlm(processor: LlavaProcessor) -> VLM:
    """A model of its own: a server's guard is attached for as long as it runs."""
    return VLM(make_model(processor), processor)


@pytest.fixture(scope="module")
def free(processor: LlavaProcessor) -> VLM:
    """The same model again, for servers of single tests."""
    return VLM(make_model(processor), processor)


@pytest.fixture(scope="module")
def halved(free: VLM, processor: LlavaProcessor, guard: Guard) -> Guard:
    """Its gate opens for half of the questions, by their texts."""
    never = with_thresholds(guard, 1e9)
    with never.attach(free.model) as attachment:
        receipts = attachment.generate(**ask(processor, QUESTIONS), max_new_tokens=1).receipts
    scores = sorted(receipt.scores["text_score"] for receipt in receipts)
    return with_thresholds(guard, (scores[1] + scores[2]) / 2)


@pytest.fixture(scope="module")
def server(vlm: VLM, halved: Guard) -> Iterator[tuple[str, Engine]]:
    with listening(vlm, halved, max_new_tokens=400, batch_wait=0.2) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[str, Engine]) -> openai.OpenAI:
    return openai_client(server[0])


@pytest.fixture(scope="module")
def expected(
    model: Model, processor: LlavaProcessor, halved: Guard
) -> Callable[..., tuple[str, Receipt]]:
    """A question's answer and receipt by `Guard.attach` and `generate`, one at a time."""

    def answer(question: str, guard: Guard = halved, **shown: Any) -> tuple[str, Receipt]:
        inputs = ask(processor, [question], **shown)
        with guard.attach(model) as attachment:
            output, (receipt,) = attachment.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True), receipt

    return answer


def image_of(question: str) -> Image:
    """The one that `ask` shows beside it."""
    return noise_image(len(question)) if len(question) % 2 else blank_image()


def asked(client: openai.OpenAI, question: str, **options: Any) -> Any:
    images = [image_of(question)] if options.pop("shown", True) else []
    given = {"temperature": 0, "max_completion_tokens": NEW} | options
    return client.chat.completions.create(model=NAME, messages=said(question, *images), **given)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_that_of_attach_and_generate(
    client: openai.OpenAI, expected: Any, question: str, shown: bool
) -> None:
    text, receipt = expected(question, images=shown)
    answer = asked(client, question, shown=shown)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (text, "length")
    assert answer.usage.completion_tokens == NEW
    assert answer.usage.prompt_tokens == receipt.text_tokens + receipt.media_tokens
    told = answer.guard
    assert shown or not receipt.findings
    assert told["open"] == receipt.guarded
    assert told["policy"] == receipt.policy
    assert told["reason"] == receipt.reason
    assert told["response"] == ("edit" if receipt.guarded else None)
    assert told["by"] == ("text_score" if receipt.guarded else None)
    assert told["images"] == int(shown)
    assert told["not_judged"] == (["images"] if shown else ["text"])


def test_turns_and_images_stand_where_they_were_said(
    client: openai.OpenAI, model: Model, processor: LlavaProcessor, halved: Guard
) -> None:
    first, second = noise_image(1), blank_image()
    parts: Any = (
        said("Which colour?", first)[0]["content"] + said("And this?", second)[0]["content"]
    )
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        *said("How to swim"),
        {"role": "assistant", "content": "With arms and legs."},
        {"role": "user", "content": parts},
    ]
    written = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow to swim<|im_end|>\n"
        "<|im_start|>assistant\nWith arms and legs.<|im_end|>\n"
        "<|im_start|>user\n<image>Which colour?<image>And this?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = processor(text=[written], images=[[first, second]], return_tensors="pt")
    with halved.attach(model) as attachment:
        output, (receipt,) = attachment.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    answer: Any = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=NEW
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    assert answer.choices[0].message.content == processor.decode(new, skip_special_tokens=True)
    assert answer.guard["images"] == receipt.images == 2
    assert answer.guard["open"] == receipt.guarded


def test_the_gate_opens_for_some_and_is_named_in_the_header(client: openai.OpenAI) -> None:
    headers = []
    for question in QUESTIONS:
        raw = client.chat.completions.with_raw_response.create(
            model=NAME, messages=said(question, image_of(question)), max_tokens=1
        )
        headers.append(raw.headers["x-guard"])
        assert raw.headers["x-request-id"]
    opened = [header for header in headers if header.startswith("open; by=text_score; response=")]
    assert len(opened) == 2
    assert sum(header.startswith("closed; policy=") for header in headers) == 2
    raw = client.chat.completions.with_raw_response.create(
        model=NAME, messages=said(QUESTIONS[0]), max_tokens=1
    )
    assert raw.headers["x-guard"].startswith("not_asked; policy=")


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stream_is_the_answer_in_pieces_and_ends_with_the_receipt(
    client: openai.OpenAI, expected: Any, question: str, usage: bool
) -> None:
    text, receipt = expected(question)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(asked(client, question, stream=True, **options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) > 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].guard["open"] == receipt.guarded
    assert not any(hasattr(chunk, "guard") for chunk in chunks[:-1])
    if usage:
        assert chunks[-1].usage.completion_tokens == NEW
        assert chunks[-1].choices == []


def test_the_receipt_can_be_left_out_and_nothing_else(client: openai.OpenAI, expected: Any) -> None:
    for question in QUESTIONS:
        answer = asked(client, question, extra_body={"guard": {"receipt": "none"}})
        assert not hasattr(answer, "guard")
        assert answer.choices[0].message.content == expected(question)[0]
    for guard in ({"receipt": "off"}, {"enabled": False}, False, {"response": "edit"}):
        with pytest.raises(openai.BadRequestError):
            asked(client, QUESTIONS[0], extra_body={"guard": guard})


@pytest.mark.parametrize("response", [Response.EDIT, Response.TEXT, Response.REFUSAL])
def test_requests_at_once_share_batches_and_get_their_own_answers(
    free: VLM, halved: Guard, expected: Any, processor: LlavaProcessor, response: Response
) -> None:
    """Streamed and whole, open and closed, of different lengths."""
    guard = halved.variant(response=response, refusal_prefix=(20, 21, 22))
    with served(free, guard, batch_wait=1.0, max_batch=8) as (client, _):
        questions = [*QUESTIONS, *QUESTIONS]

        def one(number: int) -> tuple[str, bool]:
            question, stream = questions[number], number >= len(QUESTIONS)
            given = body(question, image_of(question), max_tokens=NEW, stream=stream)
            answer = client.post("/v1/chat/completions", json=given)
            assert answer.status_code == 200
            if not stream:
                told = answer.json()
                return told["choices"][0]["message"]["content"], told["guard"]["open"]
            chunks = list(events(answer.text))
            pieces = (chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            return "".join(pieces), chunks[-1]["guard"]["open"]

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(one, range(len(questions))))
        metrics = client.get("/metrics").text
    for question, (text, is_open) in zip(questions, answers, strict=True):
        reference, receipt = expected(question, guard)
        assert (text, is_open) == (reference, receipt.guarded)
    batches = float(line_of(metrics, "vlm_safeguard_batch_answers_count"))
    assert batches < len(questions)


def events(text: str) -> Iterator[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    yield from map(json.loads, lines[:-1])


def line_of(metrics: str, name: str) -> str:
    (line,) = (line for line in metrics.splitlines() if line.startswith(f"{name} "))
    return line.split()[1]


def test_stops_lengths_seeds_and_several_answers(client: openai.OpenAI, expected: Any) -> None:
    text, _ = expected(QUESTIONS[0])
    stop = text[5:8]
    cut = text[: text.index(stop)]
    for stream in (False, True):
        answer = asked(client, QUESTIONS[0], stop=["never there", stop], stream=stream)
        if stream:
            chunks = list(answer)
            content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (content, reason) == (cut, "stop")

    options = {"temperature": 1.5, "n": 3, "seed": 7}
    first, again, other = (
        [c.message.content for c in asked(client, QUESTIONS[1], **given).choices]
        for given in (options, options, {**options, "seed": 8})
    )
    assert first == again != other
    assert len(set(first)) == 3
    stream = asked(client, QUESTIONS[1], **options, stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == first


def test_an_end_token_ends_an_answer(
    free: VLM, halved: Guard, processor: LlavaProcessor, expected: Any
) -> None:
    text, _ = expected(QUESTIONS[0])
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    with served(free, halved) as (client, _):
        whole = client.post(
            "/v1/chat/completions", json=body(QUESTIONS[0], image_of(QUESTIONS[0]), max_tokens=NEW)
        ).json()
        assert whole["choices"][0]["message"]["content"] == text
        free.model.generation_config.eos_token_id = ids[3]
        try:
            cut = client.post(
                "/v1/chat/completions",
                json=body(QUESTIONS[0], image_of(QUESTIONS[0]), max_tokens=NEW),
            ).json()
        finally:
            free.model.generation_config.eos_token_id = None
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] == ids.index(ids[3]) + 1
    assert text.startswith(cut["choices"][0]["message"]["content"])


class Steps:
    """Counts the tokens of answers, and can hold the generating thread at one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.go_on = threading.Event()
        self.go_on.set()
        add = Answer.add

        def counted(answer: Answer, token: int, ends: bool) -> None:
            self.count += 1
            assert self.go_on.wait(60)
            add(answer, token, ends)

        monkeypatch.setattr(Answer, "add", counted)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_work(
    server: tuple[str, Engine], steps: Steps, stream: bool
) -> None:
    address, engine = server
    given = body(QUESTIONS[0], image_of(QUESTIONS[0]), max_tokens=400, stream=stream)
    steps.go_on.clear()
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=given):
                steps.go_on.set()
                until(lambda: steps.count > 2)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=given, timeout=1)
            until(lambda: steps.count > 0)
            steps.go_on.set()
        answer = client.post("/v1/chat/completions", json=body("Which colour?", max_tokens=1))
        assert answer.status_code == 200
    assert steps.count < 300
    assert engine.healthy


def test_more_than_may_wait_are_told_when_to_come_back(
    free: VLM, halved: Guard, steps: Steps
) -> None:
    steps.go_on.clear()
    with served(free, halved, max_batch=1, max_choices=1, max_queue=2) as (client, engine):
        with ThreadPoolExecutor(4) as pool:
            running = [
                pool.submit(client.post, "/v1/chat/completions", json=body("Which colour?"))
                for _ in range(3)
            ]
            until(lambda: steps.count == 1 and engine.waiting == 2)
            refused = client.post("/v1/chat/completions", json=body("Which colour?"))
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            assert client.get("/ready").status_code == 200  # who looks after it is let in
            assert line_of(client.get("/metrics").text, "vlm_safeguard_queue") == "2.0"
            steps.go_on.set()
            assert [each.result().status_code for each in running] == [200] * 3
        answer = client.post("/v1/chat/completions", json=body("Which colour?"))
        assert answer.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_has_its_time(free: VLM, halved: Guard, steps: Steps, stream: bool) -> None:
    steps.go_on.clear()
    with served(free, halved, timeout=0.5) as (client, engine):
        late = client.post("/v1/chat/completions", json=body("Which colour?", stream=stream))
        if stream:
            *_, told = [line for line in late.text.split("\n\n") if line]
            assert json.loads(told.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert late.status_code == 504
            assert late.json()["error"]["code"] == "timeout"
        steps.go_on.set()
        until(lambda: engine.waiting == 0)


class Order:
    """The answers' jobs in the order of their tokens, held at the first one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[Any] = []
        self.go_on = threading.Event()
        add = Answer.add

        def noted(answer: Answer, token: int, ends: bool) -> None:
            self.jobs.append(answer.job)
            assert self.go_on.wait(60)
            add(answer, token, ends)

        monkeypatch.setattr(Answer, "add", noted)


@pytest.mark.parametrize("response", [Response.EDIT, Response.TEXT])
def test_a_long_answer_holds_a_short_one_up_for_its_turn_at_most(
    free: VLM,
    halved: Guard,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    response: Response,
) -> None:
    """Of a turn, and one more for each batch that begins before it, or where it is judged first."""
    turn, new, guard = 5, 60, halved.variant(response=response)
    order = Order(monkeypatch)
    limits: dict[str, Any] = {"max_batch": 1, "max_choices": 1, "max_begun": 3, "batch_wait": 0}
    with (
        served(free, guard, turn=turn, **limits) as (client, engine),
        ThreadPoolExecutor(3) as pool,
    ):

        def ask_for(question: str, tokens: int) -> Any:
            given = body(question, image_of(question), max_tokens=tokens)
            return pool.submit(client.post, "/v1/chat/completions", json=given)

        long = ask_for(QUESTIONS[0], new)
        until(lambda: len(order.jobs) == 1)
        second = ask_for(QUESTIONS[1], new)
        until(lambda: engine.waiting == 1)
        short = ask_for(QUESTIONS[2], 3)
        until(lambda: engine.waiting == 2)
        order.go_on.set()
        answers = [each.result().json() for each in (long, second, short)]
    first, other, last = list(dict.fromkeys(order.jobs))
    begun = order.jobs.index(last)
    # what runs has its turn; then each that came before, and one that is begun between them
    judged = turn if last.opened else 0
    assert order.jobs[:begun].count(first) <= 2 * turn + judged
    assert order.jobs[:begun].count(other) <= turn + judged
    assert order.jobs[begun : begun + 3] == [last] * 3
    counted = [answer["usage"]["completion_tokens"] for answer in answers]
    assert counted == [new, new, 3]
    for question, answer in zip(QUESTIONS, answers, strict=False):
        text, receipt = expected(question, guard)
        content = answer["choices"][0]["message"]["content"]
        assert content.startswith(text) or text.startswith(content)
        assert answer["guard"]["open"] == receipt.guarded


def test_no_more_batches_are_begun_than_may_be(
    free: VLM, halved: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(monkeypatch)
    limits: dict[str, Any] = {"max_batch": 1, "max_choices": 1, "batch_wait": 0, "turn": 2}
    with (
        served(free, halved, max_begun=1, **limits) as (client, engine),
        ThreadPoolExecutor(2) as pool,
    ):
        given = body("Which colour?", max_tokens=12)
        first = pool.submit(client.post, "/v1/chat/completions", json=given)
        until(lambda: len(order.jobs) == 1)
        second = pool.submit(client.post, "/v1/chat/completions", json=given)
        until(lambda: engine.waiting == 1)
        order.go_on.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    assert [job is order.jobs[0] for job in order.jobs] == [True] * 12 + [False] * 12


def test_a_seed_gives_the_same_answer_however_often_it_is_interrupted(
    free: VLM, halved: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = body("Which colour?", temperature=1.5, seed=7, n=2, max_tokens=30)
    plain = {**given, "seed": None}
    limits: dict[str, Any] = {"max_batch": 2, "max_choices": 2, "batch_wait": 0, "turn": 3}
    with served(free, halved, **limits) as (client, engine):

        def texts(asked: Any) -> list[str]:
            answer = client.post("/v1/chat/completions", json=asked).json()
            return [choice["message"]["content"] for choice in answer["choices"]]

        expected = texts(given)
        order = Order(monkeypatch)
        with ThreadPoolExecutor(3) as pool:
            seeded = pool.submit(texts, given)
            until(lambda: len(order.jobs) == 1)
            others = [pool.submit(texts, plain) for _ in range(2)]
            until(lambda: engine.waiting == 2)
            order.go_on.set()
            assert seeded.result() == expected
            free_ones = [text for other in others for text in other.result()]
    assert len({*expected, *free_ones}) == 6, "no two draw the same numbers"
    switches = sum(before is not job for before, job in pairwise(order.jobs))
    assert switches > 6


def test_answers_that_are_begun_end_before_the_server_does(
    free: VLM, halved: Guard, steps: Steps
) -> None:
    """What is taken is answered; what comes later is sent away."""
    steps.go_on.clear()
    with served(free, halved) as (client, engine), ThreadPoolExecutor(2) as pool:
        taken = pool.submit(client.post, "/v1/chat/completions", json=body("Which colour?"))
        until(lambda: steps.count == 1)
        engine.close()
        refused = client.post("/v1/chat/completions", json=body("Which colour?"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert client.get("/ready").status_code == 503
        steps.go_on.set()
        assert taken.result().status_code == 200
    assert "generate" not in vars(free.model), "the guard is off again"


def test_models_and_the_official_moderations(client: openai.OpenAI, expected: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    verdicts = client.moderations.create(input=list(QUESTIONS), model=NAME).results
    for question, verdict in zip(QUESTIONS, verdicts, strict=True):
        receipt = expected(question)[1]
        assert verdict.flagged == receipt.guarded
        scores: Any = verdict.category_scores
        assert scores.text_score == pytest.approx(receipt.scores["text_score"], abs=1e-3)
    parts: Any = said(QUESTIONS[0], image_of(QUESTIONS[0]))[0]["content"]
    (one,) = client.moderations.create(input=parts).results
    assert one.flagged == verdicts[0].flagged
    assert one.guard["images"] == 1  # type: ignore[attr-defined]
    assert verdicts[0].guard["images"] == 0  # type: ignore[attr-defined]


def test_litellms_guardrail_blocks_what_opens_the_gate(
    server: tuple[str, Engine], expected: Any
) -> None:
    with httpx.Client(base_url=server[0], trust_env=False, timeout=60) as client:
        url = "/beta/litellm_basic_guardrail_api"
        for question in QUESTIONS:
            opens = expected(question)[1].guarded
            texts = {"texts": [question]}
            structured = {"texts": [], "structured_messages": said(question, image_of(question))}
            for given in (texts, structured):
                told = client.post(
                    url, json={"input_type": "request", "request_data": {}, "new": 1, **given}
                ).json()
                assert told["action"] == ("BLOCKED" if opens else "NONE")
                assert ("blocked_reason" in told) == opens
        refused = client.post(url, json={"input_type": "response", "texts": ["An answer."]})
        assert refused.status_code == 400
