"""Random requests: each is answered or refused in the API's form, and none is a mistake of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlavaProcessor

from support.serving import NAME, data_url, served
from tiny.pocket import make_model
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.requests import REFUSED, ChatRequest

CASES = 150
IMAGE = data_url(noise_image(1).resize((16, 16)))

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
text = st.text(max_size=12) | st.sampled_from(["<image>", "<|im_end|>", "", "How to bake", "\0"])
url = st.just(IMAGE) | st.sampled_from(["data:image/png;base64,", "file:///etc/passwd", "x"]) | text
part = (
    st.fixed_dictionaries({"type": st.just("text"), "text": text})
    | st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": url})}
    )
    | anything
)
role = st.sampled_from(["user", "user", "user", "system", "developer", "assistant", "tool"])
message = st.fixed_dictionaries(
    {"role": role, "content": text | st.lists(part, max_size=3) | anything},
    optional={"tool_call_id": text, "name": text, "tool_calls": anything},
)
user = st.fixed_dictionaries(
    {"role": st.just("user"), "content": text | st.lists(part, min_size=1, max_size=3)}
)
#: What fields may sensibly be, beside anything at all.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "max_tokens": st.integers(0, 5),
    "n": st.integers(0, 3),
    "seed": st.integers(),
    "stop": text | st.lists(text, max_size=5),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "guard": st.fixed_dictionaries({"receipt": st.sampled_from(["none", "full", "off"])}),
}
fields = sorted({*ChatRequest.model_fields, *REFUSED} - {"messages", "model"})


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    asked = {
        "model": draw(st.just(NAME) | text),
        "messages": [*draw(st.lists(message, max_size=2)), draw(user | message)],
        "max_tokens": 2,
    }
    for name in draw(st.lists(st.sampled_from([*LIKELY, *LIKELY, *fields]), max_size=4)):
        asked[name] = draw(LIKELY.get(name, anything) | anything)
    return asked


@pytest.fixture(scope="module")
def client(processor: LlavaProcessor, guard: Guard) -> Iterator[TestClient]:
    vlm = VLM(make_model(processor), processor)
    with served(vlm, guard, batch_wait=0, max_new_tokens=5) as (running, engine):
        yield running
        assert engine.faults == 0
        assert engine.healthy


def check(answer: Any) -> None:
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert ".py" not in answer.text
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"]


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(asked=requests())
def test_random_chats(client: TestClient, asked: dict[str, Any]) -> None:
    sent = json.dumps(asked).encode()
    check(
        client.post(
            "/v1/chat/completions", content=sent, headers={"content-type": "application/json"}
        )
    )


@settings(max_examples=CASES // 3, deadline=None, derandomize=True)
@given(asked=anything | st.fixed_dictionaries({"input": text | st.lists(part | text, max_size=3)}))
def test_random_moderations(client: TestClient, asked: Any) -> None:
    sent = json.dumps(asked).encode()
    answer = client.post(
        "/v1/moderations", content=sent, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 404), answer.text


@settings(max_examples=CASES // 3, deadline=None, derandomize=True)
@given(
    asked=st.fixed_dictionaries(
        {"input_type": st.sampled_from(["request", "response"]) | anything},
        optional={
            "texts": st.lists(text, max_size=3) | anything,
            "images": st.lists(url, max_size=2) | anything,
            "structured_messages": st.lists(message, max_size=3) | anything,
        },
    )
)
def test_random_guardrails(client: TestClient, asked: Any) -> None:
    sent = json.dumps(asked).encode()
    answer = client.post(
        "/beta/litellm_basic_guardrail_api",
        content=sent,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code in (200, 400, 404), answer.text
