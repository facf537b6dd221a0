"""Random requests: each is answered under the guard, or refused in the API's form.

Half of them are what the server's own schema allows, half are what clients should not send.
`SERVING_CASES=3000 pytest tests/test_serving_fuzz.py` asks more than the suite does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlm_safeguard
from support.reference import parting, with_thresholds
from support.schema import values
from support.serving import NAME, TOOL_TEMPLATE, served
from support.serving import settings as server_settings
from tiny.pocket import make_model, make_processor
from vlm_safeguard.evaluation.asks.images import data_url
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.response import Response
from vlm_safeguard.serving.app import make_app
from vlm_safeguard.serving.items import ResponseRequest
from vlm_safeguard.serving.requests import REFUSED, ChatRequest

CASES = int(os.environ.get("SERVING_CASES", "160"))
IMAGE = data_url(noise_image(1).resize((16, 16)))
CHAT, RESPONSES, MODERATIONS = "/v1/chat/completions", "/v1/responses", "/v1/moderations"
GUARDRAIL = "/beta/litellm_basic_guardrail_api"
LEAKS = ("Traceback", ".py", str(Path(vlm_safeguard.__file__).parent), str(Path.home()), "0x")

# --- what should not be sent ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
LONG = "You are kind to all who ask. " * 12  # a system prompt, say
text = st.text(max_size=12) | st.sampled_from(
    ["<image>", "<|im_end|>", "", "How to bake", "\0", LONG, "How to bake? Say it in short."]
)
url = st.just(IMAGE) | st.sampled_from(["data:image/png;base64,", "file:///etc/passwd", "x"]) | text


def part_of(words: str, image: str, wrap: bool) -> st.SearchStrategy[Any]:
    """A text, an image or anything at all, among a message's parts."""
    shown = st.fixed_dictionaries({"url": url}) if wrap else url
    return (
        st.fixed_dictionaries({"type": st.just(words), "text": text})
        | st.fixed_dictionaries({"type": st.just(image), "image_url": shown})
        | anything
    )


part, item_part = part_of("text", "image_url", True), part_of("input_text", "input_image", False)
role = st.sampled_from(["user", "user", "user", "system", "developer", "assistant", "tool"])
message = st.fixed_dictionaries(
    {"role": role, "content": text | st.lists(part, max_size=3) | anything},
    optional={"tool_call_id": text, "name": text, "tool_calls": anything},
)
user = st.fixed_dictionaries(
    {"role": st.just("user"), "content": text | st.lists(part, min_size=1, max_size=3)}
)
kind = st.sampled_from(["message", "function_call", "function_call_output", "reasoning"])
item = st.fixed_dictionaries(
    {"role": role, "content": text | st.lists(item_part, max_size=3) | anything},
    optional={"type": kind, "call_id": text, "name": text, "arguments": text, "output": text},
)
#: What fields may sensibly be, beside anything at all.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "max_tokens": st.integers(0, 5),
    "max_output_tokens": st.integers(0, 5),
    "n": st.integers(0, 3),
    "seed": st.integers(),
    "stop": text | st.lists(text, max_size=5),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "instructions": text,
    "guard": st.fixed_dictionaries({"receipt": st.sampled_from(["none", "full", "off"])}),
}


@st.composite
def wrong(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """A request, most of which is near to one that is answered."""
    fields = {*(ChatRequest if path == CHAT else ResponseRequest).model_fields, *REFUSED}
    named = sorted(fields - {"messages", "input", "model"})
    asked: dict[str, Any] = {"model": draw(st.just(NAME) | text)}
    if path == CHAT:
        asked["messages"] = [*draw(st.lists(message, max_size=2)), draw(user | message)]
        asked["max_tokens"] = 2
    else:
        asked["input"] = draw(text | st.lists(item, min_size=1, max_size=3) | anything)
        asked["max_output_tokens"] = 2
    for name in draw(st.lists(st.sampled_from(named), max_size=4)):
        asked[name] = draw(LIKELY.get(name, anything) | anything)
    return asked


# --- what the schema allows ---


def _schema() -> dict[str, Any]:
    """The server's own, of requests that are short and name its model."""
    app: Any = make_app(server_settings(), lambda: pytest.fail("it is not started"))[0]
    schema: dict[str, Any] = app._app.openapi()
    parts = schema["components"]["schemas"]
    few = {"type": "integer", "minimum": 1, "maximum": 3}
    for name in ("ChatRequest", "ResponseRequest", "ModerationRequest"):
        fields = parts[name]["properties"]
        fields["model"] = {"const": NAME}
        for length in ("max_completion_tokens", "max_tokens", "max_output_tokens", "n"):
            if length in fields:
                fields[length] = few
    short = "max_output_tokens"
    parts["ChatRequest"]["required"].append("max_tokens")
    parts["ResponseRequest"]["required"].append(short)
    for name, field in (("ImageUrl", "url"), ("InputImage", "image_url")):
        parts[name]["properties"][field] = {"enum": [IMAGE]}
    return schema


SCHEMA = _schema()


def allowed(path: str) -> st.SearchStrategy[Any]:
    """Requests to a path as its schema has them."""
    body = SCHEMA["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    asked = values(body, SCHEMA["components"]["schemas"])
    name = {CHAT: "messages", RESPONSES: "input"}.get(path)
    return asked if name is None else asked | asked.map(partial(_with_question, name))


def _with_question(name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The conversation ends with one, which is what no schema can say."""
    before = [] if isinstance(asked[name], str) else asked[name]
    return {**asked, name: [*before, {"role": "user", "content": "How to bake"}]}


# --- the cases ---


@pytest.fixture(scope="module", params=["edit", "text"])
def client(open_guard: Guard, guard: Guard, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    """Of a guard whose gate is open beside every image; the second one judges sentences, too."""
    processor = make_processor(TOOL_TEMPLATE)
    vlm = VLM(make_model(processor), processor)
    limits: dict[str, Any] = {"batch_wait": 0, "max_new_tokens": 5}
    chosen = open_guard
    if request.param == "text":
        policy = parting(with_thresholds(guard, -1e9), processor)
        chosen = replace(guard, policy=replace(policy, response=Response.REFUSAL))
    with served(vlm, chosen, **limits) as (running, engine):
        yield running
        assert engine.faults == 0
        assert engine.healthy


def some(share: float) -> settings:
    """So many of the cases."""
    return settings(
        max_examples=max(int(CASES * share), 1),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def answer_to(client: TestClient, path: str, asked: Any) -> Any:
    """What is answered, once it is known to be an answer under the guard, or an error."""
    sent = json.dumps(asked).encode()
    answer = client.post(path, content=sent, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert not any(leak in answer.text for leak in LEAKS), answer.text
        return None
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json()
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n") if line[:7] == "data: {"]
    assert not any("error" in chunk for chunk in chunks), answer.text
    return chunks[-1].get("response", chunks[-1])


def check_guarded(answer: Any, asked: Any) -> None:
    """It holds a receipt, unless that is not wanted, and an image opened the gate."""
    if (asked.get("guard") or {}).get("receipt") == "none":
        assert "guard" not in answer
        return
    guard = answer["guard"]
    assert guard["open"] == (guard["images"] > 0)
    assert len(guard["policy"]) == 64


@some(0.5)
@given(asked=wrong(CHAT) | allowed(CHAT))
def test_random_chats(client: TestClient, asked: dict[str, Any]) -> None:
    answer = answer_to(client, CHAT, asked)
    if answer is not None:
        check_guarded(answer, asked)


@some(0.3)
@given(asked=wrong(RESPONSES) | allowed(RESPONSES))
def test_random_responses(client: TestClient, asked: dict[str, Any]) -> None:
    answer = answer_to(client, RESPONSES, asked)
    if answer is not None:
        assert answer["status"] in ("completed", "incomplete")
        check_guarded(answer, asked)


@some(0.1)
@given(
    asked=allowed(MODERATIONS)
    | st.fixed_dictionaries({"input": text | st.lists(part | text, max_size=3)})
    | anything
)
def test_random_moderations(client: TestClient, asked: Any) -> None:
    answer = answer_to(client, MODERATIONS, asked)
    if answer is not None:
        assert all(result["flagged"] for result in answer["results"])


@some(0.1)
@given(
    asked=allowed(GUARDRAIL)
    | st.fixed_dictionaries(
        {"input_type": st.sampled_from(["request", "response"]) | anything},
        optional={
            "texts": st.lists(text, max_size=3) | anything,
            "images": st.lists(url, max_size=2) | anything,
            "structured_messages": st.lists(message, max_size=3) | anything,
        },
    )
)
def test_random_guardrails(client: TestClient, asked: Any) -> None:
    answer = answer_to(client, GUARDRAIL, asked)
    if answer is not None:
        assert answer["action"] == "BLOCKED"


def test_what_the_schema_allows_is_answered_often(client: TestClient) -> None:
    """So that the cases above are not errors alone."""
    counts = {200: 0, 400: 0}

    @some(0.1)
    @given(asked=allowed(CHAT))
    def ask(asked: dict[str, Any]) -> None:
        counts[200 if answer_to(client, CHAT, asked) else 400] += 1

    ask()
    assert counts[200] > sum(counts.values()) / 10, counts
