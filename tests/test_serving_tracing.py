"""OpenTelemetry spans: one for each request, with its parts, and nothing that a client wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from transformers import LlavaProcessor

from support.serving import body, settings, until
from tiny.pocket import make_model
from vlm_safeguard.extras import MissingExtraError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.app import make_app
from vlm_safeguard.serving.tracing import Tracing, tracing_to

MARKER = "zanzibar"
TRACE = "0af7651916cd43dd8448eb211c80319c"
COLLECTOR = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(scope="module")
def spans(processor: LlavaProcessor, open_guard: Guard) -> Sequence[ReadableSpan]:
    """Of an answer, a stream, a verdict, and several requests that are wrong."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    vlm = VLM(make_model(processor), processor)
    app, engine = make_app(settings(), lambda: (vlm, open_guard), tracing=tracing)
    with TestClient(app) as client:
        until(lambda: engine.ready)

        def post(path: str, given: Any, **headers: str) -> None:
            client.post(f"/v1/{path}", json=given, headers=headers)

        asked = body(f"{MARKER} bake", noise_image(1))
        post("chat/completions", asked, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
        post("chat/completions", {**asked, "stream": True})
        post("responses", {"model": asked["model"], "input": MARKER, "max_output_tokens": 2})
        post("chat/completions", body(f"{MARKER} <image>"))
        post("chat/completions", body("x", **{MARKER: MARKER}))
        post("moderations", {"input": MARKER})
        post(MARKER, {})
        client.get("/health")
    tracing.close()
    return exporter.get_finished_spans()


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_is_a_span_with_its_parts(spans: Sequence[ReadableSpan]) -> None:
    names = ["POST /v1/chat/completions"] * 4 + ["POST /v1/moderations", "POST /v1/responses"]
    requests = [span for span in spans if span.name.startswith("POST ")]
    assert sorted(span.name for span in requests) == [*names, "POST other"]
    assert all(span.resource.attributes["service.name"] == "vlm-safeguard" for span in spans)
    (first,) = (span for span in requests if f"{span.context.trace_id:032x}" == TRACE)
    assert facts(first)["http.response.status_code"] == 200
    assert facts(first)["vlm_safeguard.request_id"].startswith("req-")
    parts = [s for s in spans if s.parent and s.parent.span_id == first.context.span_id]
    assert [span.name for span in parts] == ["read", "decide", "answer"]
    answer = facts(parts[-1])
    assert answer["gen_ai.usage.output_tokens"] == 4
    assert answer["gen_ai.usage.input_tokens"] > 4
    assert (answer["vlm_safeguard.gate"], answer["vlm_safeguard.criterion"]) == ("open", "open")
    assert answer["vlm_safeguard.images"] == 1
    assert sorted(facts(span)["http.response.status_code"] for span in requests) == [
        *(200, 200, 200, 200, 400, 400, 404)
    ]


def test_spans_hold_nothing_that_was_asked(spans: Sequence[ReadableSpan]) -> None:
    told = "".join(span.to_json() for span in spans)
    assert MARKER not in told
    assert "base64" not in told
    assert not any(span.events for span in spans)
    failed = [facts(span)["error.type"] for span in spans if "error.type" in facts(span)]
    assert failed == ["ApiError"]


def test_there_are_spans_where_there_is_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is given, or as the standard variables say."""
    posted: list[str] = []
    monkeypatch.delenv(COLLECTOR, raising=False)
    for given, variables, address in (
        (None, {}, None),
        ("http://127.0.0.1:4318/", {}, "http://127.0.0.1:4318/v1/traces"),
        (None, {COLLECTOR: "http://127.0.0.1:1"}, "http://127.0.0.1:1/v1/traces"),
        ("http://a:1", {"OTEL_SDK_DISABLED": "true"}, None),
        (None, {COLLECTOR: "http://a:1", "OTEL_TRACES_EXPORTER": "none"}, None),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            tracing = tracing_to(given)
            posted.clear()
            patch.setattr(
                "opentelemetry.exporter.otlp.proto.http.trace_exporter.OTLPSpanExporter.export",
                lambda exporter, spans: posted.append(exporter._endpoint),
            )
            with tracing.request("POST /x", {}), tracing.part("read"):
                pass
            tracing.close()
        assert set(posted) == ({address} if address else set())


def test_a_collector_without_the_extra_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_safeguard.extras.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"vlm-safeguard\[telemetry\]"):
        tracing_to("http://127.0.0.1:4318")
