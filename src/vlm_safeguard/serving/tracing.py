"""OpenTelemetry spans of requests, where somebody collects them; none holds what a client wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm_safeguard.extras import require

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Span:
    """One that is open; without a collector it records nothing."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def note(self, **facts: Any) -> None:
        """Add attributes; `__` in a name stands for a dot, and None is left out."""
        if self._span is not None:
            for name, value in facts.items():
                if value is not None:
                    self._span.set_attribute(name.replace("__", "."), value)


class Tracing:
    """Of one server."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Sends spans by `exporter`; without one there are none."""
        self._provider = None if exporter is None else _provider(exporter)
        self._tracer = None
        if self._provider is not None:
            self._tracer = self._provider.get_tracer("vlm_safeguard.serving")

    @contextmanager
    def request(self, name: str, headers: Mapping[bytes, bytes]) -> Iterator[Span]:
        """A request's span, which goes on from where its `traceparent` header says."""
        if self._tracer is None:
            yield Span()
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        with self._tracer.start_as_current_span(
            name,
            extract(given),
            SpanKind.SERVER,
            record_exception=False,  # whose message may hold anything
            set_status_on_exception=False,
        ) as span:
            yield Span(span)

    @contextmanager
    def part(self, name: str) -> Iterator[Span]:
        """A part of the current request's."""
        span = None if self._tracer is None else self._tracer.start_span(name)
        try:
            yield Span(span)
        except BaseException as error:
            if span is not None:
                span.set_attribute("error.type", type(error).__name__)
            raise
        finally:
            if span is not None:
                span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def tracing_to(endpoint: str | None) -> Tracing:
    """Spans by OTLP over HTTP, to `endpoint` or where the standard variables say; else none.

    Raises:
        MissingExtraError: there is a collector, and the extra that sends to it is missing.
    """
    variables = os.environ
    off = variables.get("OTEL_SDK_DISABLED") == "true"
    off = off or variables.get("OTEL_TRACES_EXPORTER") == "none"
    if off or not (endpoint or any(variables.get(name) for name in _ENDPOINTS)):
        return Tracing()
    require("telemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(endpoint and f"{endpoint.rstrip('/')}/v1/traces"))


def _provider(exporter: SpanExporter) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "vlm-safeguard"}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
