"""What a client did wrong, or what went wrong here, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What went wrong, as OpenAI's API has it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is an error: `{"error": {"message", "type", "param", "code"}}`.

    Attributes:
        status: of HTTP.
        kind: "type" in the answer.
        param: the request's field that is wrong, if it is one.
        code: for programs.
        retry_after: seconds after which to come back.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        told = ErrorBody(message=str(self), type=self.kind, param=self.param, code=self.code)
        return ErrorAnswer(error=told).model_dump()

    def response(self) -> JSONResponse:
        """As an answer of HTTP."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return JSONResponse(self.body, self.status, headers)


def guard_fault() -> ApiError:
    """A pass could not be guarded; its reason is in the log, as it may name what is within."""
    return ApiError(
        "The guard could not act on this request, so nothing more is generated.",
        status=500,
        kind="server_error",
        code="guard_fault",
    )


def too_late() -> ApiError:
    """The request's time is over."""
    return ApiError(
        "The answer was not ready in time, so it was stopped. Ask for fewer tokens, or come back "
        "when fewer requests wait.",
        status=504,
        kind="server_error",
        code="timeout",
    )


def going_down() -> ApiError:
    """Nothing new is begun."""
    return ApiError(
        "The server is not ready: it is starting, or going down.",
        status=503,
        kind="server_error",
        code="not_ready",
        retry_after=5,
    )


def internal() -> ApiError:
    """A mistake of ours; no more is said of it than that."""
    return ApiError(
        "The server failed on this request.", status=500, kind="server_error", code="internal"
    )


def invalid(errors: Sequence[Any], refused: dict[str, str]) -> ApiError:
    """What pydantic found wrong first, told without what was given.

    Args:
        errors: as `ValidationError.errors` gives them.
        refused: fields that are known, and why they are not taken.
    """
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        name = place[-1]
        if len(place) == 1 and name in refused:
            message = f"'{name}' is not taken: {refused[name]}."
            return ApiError(message, param=param, code="unsupported_parameter")
        return ApiError(f"There is no field '{param}'.", param=param, code="unknown_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    message = f"{param}: {reason}." if param else f"The request cannot be read: {reason}."
    return ApiError(message, param=param, code="invalid_value")
