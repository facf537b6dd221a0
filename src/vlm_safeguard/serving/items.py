"""What may be asked of `/v1/responses`: its items are a conversation's messages in another form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from vlm_safeguard.serving.messages import Content, Name, Wire
from vlm_safeguard.serving.requests import ChatRequest, GuardOptions, ResponseFormat

_STATUS = Literal["in_progress", "completed", "incomplete"]


class InputText(Wire):
    """A text among an item's parts."""

    type: Literal["input_text"]
    text: str

    @property
    def part(self) -> dict[str, Any]:
        """As messages have it."""
        return {"type": "text", "text": self.text}


class InputImage(Wire):
    """An image among an item's parts."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"  # the processor decides

    @property
    def part(self) -> dict[str, Any]:
        """As messages have it."""
        return {"type": "image_url", "image_url": {"url": self.image_url}}


class OutputText(Wire):
    """A text of an answer that was given."""

    type: Literal["output_text", "input_text"]
    text: str
    annotations: list[Any] = Field([], max_length=0)
    logprobs: list[Any] = Field([], max_length=0)


class Refusal(Wire):
    """A refusal that was given."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What it said."""
        return self.refusal


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]
OutputPart = Annotated[OutputText | Refusal, Field(discriminator="type")]


class MessageItem(Wire):
    """What a user says and shows, or who runs the application."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: Content[InputPart]
    id: str | None = None
    status: _STATUS | None = None

    def message(self) -> dict[str, Any]:
        """As chat completions have it."""
        return {"role": self.role, "content": _parts(self.content)}


class AnswerItem(Wire):
    """An answer that the model gave."""

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: Content[OutputPart]
    id: str | None = None
    status: _STATUS | None = None
    phase: str | None = None

    def message(self) -> dict[str, Any]:
        """As chat completions have it."""
        if isinstance(self.content, str):
            return {"role": "assistant", "content": self.content}
        parts = [{"type": "text", "text": part.text} for part in self.content]
        return {"role": "assistant", "content": parts}


class CallItem(Wire):
    """A call of a function that the model made."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    id: str | None = None
    status: _STATUS | None = None

    def call(self) -> dict[str, Any]:
        """As chat completions have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class OutputItem(Wire):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Content[InputText]
    id: str | None = None
    status: _STATUS | None = None

    def message(self) -> dict[str, Any]:
        """As chat completions have it."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": _parts(self.output)}


def _kind(item: Any) -> str:
    """Which kind of item it is; a message may leave its type out."""
    given = item if isinstance(item, dict) else getattr(item, "__dict__", {})
    kind = given.get("type") or "message"
    return "answer" if (kind, given.get("role")) == ("message", "assistant") else str(kind)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[AnswerItem, Tag("answer")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Wire):
    """A function that the model may call, its parameters as a JSON schema."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] = Field({})
    strict: Literal[False] = False  # arguments are not held to the schema


class TextOptions(Wire):
    """The form of the answer: text."""

    format: ResponseFormat = ResponseFormat(type="text")


class ResponseStreamOptions(Wire):
    """Nothing can be chosen of a stream."""

    include_obfuscation: Literal[False] = False


class ResponseRequest(Wire):
    """A request to `/v1/responses`; each is answered from what it holds, and nothing is kept."""

    model: str
    input: Content[Item]
    instructions: str | None = None
    tools: list[FunctionTool] = Field([], max_length=128)
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: ResponseStreamOptions = ResponseStreamOptions()
    guard: GuardOptions = GuardOptions()
    text: TextOptions = TextOptions()
    truncation: Literal["disabled"] = "disabled"
    include: list[str] = Field([], max_length=0)
    top_logprobs: Literal[0] = 0
    store: Literal[False] = False
    background: Literal[False] = False
    user: str | None = None  # taken for the clients that send them, and not used
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def chat(self) -> ChatRequest:
        """The same request as chat completions have it.

        Raises:
            ValidationError: its items are no conversation that can be answered.
        """
        tools = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})}
            for tool in self.tools
        ]
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": list(self._messages()),
                "tools": tools,
                "tool_choice": self.tool_choice,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "max_completion_tokens": self.max_output_tokens,
                "stream": self.stream,
                "guard": self.guard,
            }
        )

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Calls belong to the answer that they follow."""
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        answer: dict[str, Any] | None = None
        for item in self.input:
            if isinstance(item, CallItem):
                answer = answer or {"role": "assistant", "content": ""}
                answer.setdefault("tool_calls", []).append(item.call())
                continue
            if answer is not None:
                yield answer
            answer = item.message() if isinstance(item, AnswerItem) else None
            if answer is None:
                yield item.message()
        if answer is not None:
            yield answer


def _parts(content: Any) -> Any:
    return content if isinstance(content, str) else [part.part for part in content]
