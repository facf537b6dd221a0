"""LiteLLM's client, unmodified; only where it is installed, as it is large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask
from support.serving import NAME, TOOL_TEMPLATE, listening, said
from tiny.pocket import make_model, make_processor
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.tools import Reply

litellm: Any = pytest.importorskip("litellm", reason="LiteLLM is not installed")

QUESTION, NEW = QUESTIONS[0], 8
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def address(open_guard: Guard) -> Iterator[str]:
    processor = make_processor(TOOL_TEMPLATE)
    vlm = VLM(make_model(processor), processor)
    with listening(vlm, open_guard, max_new_tokens=20, batch_wait=0) as (address, _):
        yield address


@pytest.fixture(scope="module")
def expected(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, open_guard: Guard
) -> str:
    """By `Guard.attach` and `generate`."""
    inputs = ask(processor, [QUESTION])
    with open_guard.attach(model):
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    text: str = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def asked(address: str, **options: Any) -> Any:
    given = {
        "model": f"openai/{NAME}",
        "api_base": f"{address}/v1",
        "api_key": "none",
        "messages": said(QUESTION, noise_image(len(QUESTION))),
        "temperature": 0,
        "max_tokens": NEW,
    }
    return litellm.completion(**given | options)


def test_an_answer_and_a_stream_are_those_of_attach_and_generate(
    address: str, expected: str
) -> None:
    answer = asked(address)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == NEW
    assert answer.guard["open"]
    chunks = list(asked(address, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_responses(address: str, expected: str) -> None:
    message = said(QUESTION, noise_image(len(QUESTION)))[0]
    url = message["content"][0]["image_url"]["url"]
    content = [
        {"type": "input_image", "image_url": url},
        {"type": "input_text", "text": QUESTION},
    ]
    answer = litellm.responses(
        model=f"openai/{NAME}",
        api_base=f"{address}/v1",
        api_key="none",
        input=[{"role": "user", "content": content}],
        temperature=0,
        max_output_tokens=16,  # LiteLLM asks for no fewer
    )
    assert (
        answer.output[0].content[0].text == asked(address, max_tokens=16).choices[0].message.content
    )
    assert answer.output[0].content[0].text.startswith(expected)


def test_tools(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    monkeypatch.setattr("vlm_safeguard.serving.answering.read_reply", lambda *_: Reply("", (call,)))
    (called,) = asked(address, tools=[WEATHER]).choices[0].message.tool_calls
    assert (called.id, called.function.name) == ("call_1", "weather")
    chunks = list(asked(address, tools=[WEATHER], stream=True))
    calls = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    assert [each.function.name for each in calls] == ["weather"]


def test_errors(address: str) -> None:
    with pytest.raises(litellm.BadRequestError, match="logit_bias"):
        asked(address, logit_bias={"1": -100})
    with pytest.raises(litellm.NotFoundError):
        asked(address, model="openai/other")
    with pytest.raises(litellm.BadRequestError, match="20 at most"):
        asked(address, max_tokens=21)
