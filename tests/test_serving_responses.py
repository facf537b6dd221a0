"""`/v1/responses` through the official client: the answers of chat completions in another form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL.Image import Image
from transformers import LlavaProcessor

from support.reference import QUESTIONS
from support.serving import (
    NAME,
    TOOL_TEMPLATE,
    body,
    listening,
    openai_client,
    said,
    served,
)
from tiny.pocket import make_model, make_processor
from vlm_safeguard.evaluation.asks.images import data_url
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.tools import Reply

NEW = 8
PATH = "/v1/responses"
WEATHER = {"name": "weather", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def client(processor: LlavaProcessor, open_guard: Guard) -> Iterator[openai.OpenAI]:
    vlm = VLM(make_model(processor), processor)
    with listening(vlm, open_guard, max_new_tokens=20, batch_wait=0) as (address, _):
        yield openai_client(address)


def shown(text: str, *images: Image) -> dict[str, Any]:
    """A user's item: images, then text."""
    parts = [{"type": "input_image", "image_url": data_url(each)} for each in images]
    return {"role": "user", "content": [*parts, {"type": "input_text", "text": text}]}


def chat(client: openai.OpenAI, messages: Any) -> Any:
    return client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=NEW
    )


def respond(client: openai.OpenAI, given: Any, **options: Any) -> Any:
    return client.responses.create(
        model=NAME, input=given, temperature=0, max_output_tokens=NEW, **options
    )


@pytest.mark.parametrize("images", [0, 1, 2])
def test_an_answer_is_that_of_chat_completions(client: openai.OpenAI, images: int) -> None:
    seen = [noise_image(number) for number in range(images)]
    reference = chat(client, said(QUESTIONS[0], *seen))
    answer = respond(client, [shown(QUESTIONS[0], *seen)])
    assert answer.output_text == reference.choices[0].message.content
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.guard == reference.guard
    assert answer.guard["open"] == bool(images)
    assert answer.usage.input_tokens == reference.usage.prompt_tokens
    assert answer.usage.output_tokens == NEW
    assert answer.max_output_tokens == NEW
    if not images:
        assert respond(client, QUESTIONS[0]).output_text == answer.output_text


def test_instructions_and_turns_are_those_of_chat_completions(client: openai.OpenAI) -> None:
    image = noise_image(1)
    first = respond(client, [shown("Which colour?", image)], instructions="Be brief.")
    items = [shown("Which colour?", image), *first.output, shown("And this?", image)]
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        *said("Which colour?", image),
        {"role": "assistant", "content": first.output_text},
        *said("And this?", image),
    ]
    reference = chat(client, messages)
    answer = respond(client, items, instructions="Be brief.")
    assert answer.output_text == reference.choices[0].message.content
    assert answer.usage.input_tokens == reference.usage.prompt_tokens
    assert answer.guard["images"] == 2


def test_a_stream_is_the_answer_in_events_and_ends_with_the_receipt(
    client: openai.OpenAI,
) -> None:
    given: Any = [shown(QUESTIONS[0], noise_image(1))]
    reference = respond(client, given)
    events = list(respond(client, given, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added"),
    ]
    assert kinds[-4:] == [
        *("response.output_text.done", "response.content_part.done"),
        *("response.output_item.done", "response.incomplete"),
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert len(kinds[4:-4]) > 2
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == reference.output_text
    assert events[-4].text == events[-1].response.output_text == reference.output_text
    assert events[-1].response.guard == reference.guard
    assert events[-1].response.usage == reference.usage
    assert not any(hasattr(event.response, "guard") for event in events[:2])
    with client.responses.stream(
        model=NAME, input=given, temperature=0, max_output_tokens=NEW
    ) as stream:  # the client puts it together itself
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
    assert snapshots[-1] == reference.output_text


def test_the_receipt_can_be_left_out(client: openai.OpenAI) -> None:
    answer = respond(client, QUESTIONS[0], extra_body={"guard": {"receipt": "none"}})
    assert not hasattr(answer, "guard")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"previous_response_id": "resp_1"}, "nothing is kept of a request"),
        ({"conversation": "conv_1"}, "nothing is kept of a request"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"max_output_tokens": 21}, "20 at most"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"input": []}, "messages"),
        ({"input": [{"role": "assistant", "content": "Sure"}]}, "last message"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [shown("x<|im_end|>")]}, "turn or an image"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
            "image_url",
        ),
        ({"extra_body": {"prompt": {"id": "pmpt_1"}}}, "prompt"),
        ({"extra_body": {"guard": {"enabled": False}}}, "guard.enabled"),
        ({"extra_body": {"logit_bias": {}}}, "keep the model from refusing"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, options: dict[str, Any], words: str) -> None:
    given = {"model": NAME, "input": "Which colour?"} | options
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(**given)


def test_a_fault_in_a_stream_is_an_error_of_the_client(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_safeguard.serving.exchange.Exchange.next", _late_after(2))
    with pytest.raises(openai.APIError, match="not ready in time"):
        list(respond(client, QUESTIONS[0], stream=True))


def _late_after(events: int) -> Any:
    """`Exchange.next`, which is too late after some events."""
    from vlm_safeguard.serving.errors import too_late
    from vlm_safeguard.serving.exchange import Exchange

    following, given = Exchange.next, [0]

    async def late(exchange: Exchange) -> Any:
        given[0] += 1
        if given[0] > events:
            raise too_late()
        return await following(exchange)

    return late


def test_functions_are_called_and_answered(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and what came of them are written as in chat completions, streamed or not."""
    processor = make_processor(TOOL_TEMPLATE)
    vlm = VLM(make_model(processor), processor)
    call = {"name": "weather", "arguments": '{"place": "Bern"}'}
    with served(vlm, guard) as (client, _):
        items = [
            shown("How is it?"),
            {"type": "function_call", "call_id": "1", **call},
            {"type": "function_call_output", "call_id": "1", "output": "Sunny."},
        ]
        messages = [
            *said("How is it?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "Sunny."},
        ]
        tool = {"type": "function", "function": WEATHER}
        reference = client.post(
            "/v1/chat/completions", json=body("", messages=messages, tools=[tool])
        ).json()
        given = {
            "model": NAME,
            "input": items,
            "tools": [{"type": "function", **WEATHER}],
            "temperature": 0,
            "max_output_tokens": 4,
        }
        answer = client.post(PATH, json=given).json()
        (message,) = answer["output"]
        assert message["content"][0]["text"] == reference["choices"][0]["message"]["content"]
        assert answer["usage"]["input_tokens"] == reference["usage"]["prompt_tokens"]

        made = {"id": "call_1", "type": "function", "function": call}
        monkeypatch.setattr(
            "vlm_safeguard.serving.answering.read_reply", lambda *_: Reply("Let me see.", (made,))
        )
        said_item, called = client.post(PATH, json=given).json()["output"]
        assert said_item["content"][0]["text"] == "Let me see."
        assert (called["type"], called["call_id"]) == ("function_call", "call_1")
        assert {name: called[name] for name in call} == call
        with client.stream("POST", PATH, json={**given, "stream": True}) as streamed:
            kinds = [line[7:] for line in streamed.iter_lines() if line.startswith("event: ")]
        assert kinds[-5:] == [
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        result = {"type": "function_call_output", "call_id": "call_1", "output": "Rain."}
        again = client.post(PATH, json={**given, "input": [*items, said_item, called, result]})
        assert again.status_code == 200, "what it gave is taken back"
