"""Conversations and tools as OpenAI's API writes them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

T = TypeVar("T")

#: A text, or a list of parts: an error names what is wrong in the one that was meant.
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[T], Tag("parts")],
    Discriminator(lambda content: "text" if isinstance(content, str) else "parts"),
]


class Wire(BaseModel):
    """A part of a request: a field that it does not have is an error, and null is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class TextPart(Wire):
    """A text among a message's parts."""

    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    """Where an image is: in itself (`data:`), or at a host that is allowed."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # the processor decides


class ImagePart(Wire):
    """An image among a message's parts."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Wire):
    """What the one who runs the application says first."""

    role: Literal["system", "developer"]
    content: Content[TextPart]
    name: str | None = None


class UserMessage(Wire):
    """What a user says and shows."""

    role: Literal["user"]
    content: Content[Part]
    name: str | None = None


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class CalledFunction(Wire):
    """A function and its arguments, as JSON in a string."""

    name: Name
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Self:
        try:
            given = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ValueError("a function's arguments are not an object in JSON")
        return self


class ToolCall(Wire):
    """A call that the model made."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Wire):
    """What the model said, or the tools that it called."""

    role: Literal["assistant"]
    content: Content[TextPart] = ""
    refusal: str | None = None
    tool_calls: list[ToolCall] = []
    annotations: list[Any] = Field([], max_length=0)
    name: str | None = None


class ToolMessage(Wire):
    """What a tool gave."""

    role: Literal["tool"]
    content: Content[TextPart]
    tool_call_id: Name


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Wire):
    """A function that the model may call, its parameters as a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: Literal[False] = False  # arguments are not held to the schema


class Tool(Wire):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class Conversation(Wire):
    """What is asked: messages that end with the user's, or a tool's."""

    messages: list[Message] = Field(min_length=1)

    @model_validator(mode="after")
    def _ends_with_a_request(self) -> Self:
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError(
                "the last message is not the user's or a tool's: an answer that is begun in the "
                "request is not gone on with"
            )
        if all(message.role != "user" for message in self.messages):
            raise ValueError("no message is the user's, so there is nothing to answer")
        return self

    @property
    def images(self) -> list[str]:
        """The addresses of all images, in order."""
        return [
            part.image_url.url
            for message in self.messages
            if not isinstance(message.content, str)
            for part in message.content
            if isinstance(part, ImagePart)
        ]

    def with_image(self) -> Conversation:
        """The same with a place for an image before the last words of the user."""
        messages = list(self.messages)
        last = max(n for n, message in enumerate(messages) if message.role == "user")
        said = messages[last].content
        parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
        content = [_BLANK, *parts]
        messages[last] = UserMessage.model_validate({"role": "user", "content": content})
        return Conversation(messages=messages)

    @property
    def uses_tools(self) -> bool:
        """Whether a message is a tool's, or calls one."""
        return any(
            message.role == "tool" or getattr(message, "tool_calls", [])
            for message in self.messages
        )

    def written(self) -> list[dict[str, Any]]:
        """As chat templates take it: every content in parts, images without their addresses."""
        return [_written(message) for message in self.messages]


_BLANK = ImagePart(type="image_url", image_url=ImageUrl(url="data:"))


def _written(message: Message) -> dict[str, Any]:
    content = message.content
    parts: Sequence[TextPart | ImagePart]
    parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
    written: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in parts
        ],
    }
    if isinstance(message, AssistantMessage) and message.tool_calls:
        written["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.loads(call.function.arguments or "{}"),
                },
            }
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        written["tool_call_id"] = message.tool_call_id
    return written


def texts_in(value: Any) -> Iterator[str]:
    """Every text within plain JSON values, the names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from texts_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts_in(each)
