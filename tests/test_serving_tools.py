"""Tools: written by the chat template, and read off the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlavaProcessor

from support.serving import TOOL_TEMPLATE, body, served
from tiny.pocket import make_model, make_processor
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.prompts import Prompt
from vlm_safeguard.serving.tools import read_reply

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_calls_and_results_are_written_as_the_template_does(
    guard: Guard, choice: str
) -> None:
    processor = make_processor(TOOL_TEMPLATE)
    vlm = VLM(make_model(processor), processor)
    function = {"name": "weather", "arguments": '{"place": "Bern"}'}
    call = {"id": "1", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Sunny."},
    ]
    given = body("", messages=messages, tools=[WEATHER], tool_choice=choice, max_tokens=8)
    written = (
        "<|im_start|>system\nTools: weather<|im_end|>\n"
        * (choice == "auto")
        + "<|im_start|>user\nHow is it?<|im_end|>\n"
        "<|im_start|>assistant\nweather(Bern)<|im_end|>\n"
        "<|im_start|>tool\nSunny.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = torch.tensor([processor.tokenizer.encode(written)])
    out = vlm.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    expected = processor.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with served(vlm, guard) as (client, _):
        answer = client.post("/v1/chat/completions", json=given).json()
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        assert answer["choices"][0]["message"]["content"] == expected
        streamed = client.post("/v1/chat/completions", json={**given, "stream": True}).text
        lines = [line[6:] for line in streamed.split("\n\n") if line.startswith("data: {")]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        assert "".join(delta.get("content") or "" for delta in deltas) == expected
        for text in ("<image>", "x<|im_end|>"):
            named = {"name": "weather", "description": text}
            told = {**given, "tools": [{"type": "function", "function": named}]}
            refused = client.post("/v1/chat/completions", json=told)
            if choice == "auto":
                assert refused.json()["error"]["code"] == "special_token"
        broken = {**call, "function": {"name": "weather", "arguments": "[1"}}
        messages[1]["tool_calls"] = [broken]
        assert client.post("/v1/chat/completions", json=given).status_code == 400


def reply(processor: LlavaProcessor, text: str) -> Any:
    return read_reply(text, [], Prompt("", (), ()), processor.tokenizer)


def test_calls_are_read_off_an_answer(processor: LlavaProcessor) -> None:
    told = reply(
        processor,
        'Let me look. <tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n'
        '</tool_call><tool_call>{"name": "now", "arguments": "{}"}</tool_call>',
    )
    assert told.message["content"] == "Let me look."
    first, second = told.message["tool_calls"]
    assert first["function"]["name"] == "weather"
    assert json.loads(first["function"]["arguments"]) == {"place": "Bern"}
    assert (second["function"]["name"], second["function"]["arguments"]) == ("now", "{}")
    assert first["id"] != second["id"]
    assert [call["index"] for call in told.delta["tool_calls"]] == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "Plain.",
        "",
        "<tool_call>{broken}</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>",
    ],
)
def test_what_is_no_call_is_text(processor: LlavaProcessor, text: str) -> None:
    told = reply(processor, text)
    assert told.message == {"content": text, "refusal": None}
    assert told.calls == ()
