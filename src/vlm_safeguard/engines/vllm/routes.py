"""vLLM's routes: which are guarded, which generate nothing, and which are refused and why."""

from __future__ import annotations

#: Their answers come from `generate`, so none leaves without a receipt.
GUARDED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        "/invocations",
    }
)
#: They generate nothing.
PASSED = frozenset(
    {
        *("/health", "/ping", "/version", "/load", "/metrics", "/v1/models"),
        *("/tokenize", "/detokenize", "/v1/messages/count_tokens"),
        *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
    }
)
_NO_ANSWER = "it does not answer as the model does, and was not tested under the guard"
_OTHER_MODEL = "it changes the model that the guard was fitted on"
_UNSENT = "it renders images that the engine is then not given, which later requests would miss"
_STORED = "stored answers carry no receipt"
#: And why.
REFUSED = {
    "/generative_scoring": _NO_ANSWER,
    "/v1/systemone": _NO_ANSWER,
    "/inference/v1/abort_requests": _NO_ANSWER,
    "/kv_event_sources": _NO_ANSWER,
    "/v1/chat/completions/render": _UNSENT,
    "/v1/completions/render": _UNSENT,
    "/v1/messages/render": _UNSENT,
    "/v1/responses/render": _UNSENT,
    "/v1/chat/completions/derender": _NO_ANSWER,
    "/v1/completions/derender": _NO_ANSWER,
    "/v1/responses/{response_id}": _STORED,
    "/v1/responses/{response_id}/cancel": _STORED,
    "/v1/load_lora_adapter": _OTHER_MODEL,
    "/v1/unload_lora_adapter": _OTHER_MODEL,
    "/scale_elastic_ep": _NO_ANSWER,
    "/is_scaling_elastic_ep": _NO_ANSWER,
}


def reason(path: str) -> str | None:
    """Why a path is refused; None where it is not."""
    if path.removesuffix("/") in GUARDED | PASSED:
        return None
    return REFUSED.get(path, "it is not known whether it is guarded")
