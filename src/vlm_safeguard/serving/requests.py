"""What may be asked of the server, field by field; what is not here is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlm_safeguard.serving.messages import Conversation, Part, Tool, Wire

_AROUND = "it could keep the model from refusing, or the guard from reading the request"
_GRAMMAR = "an answer that is held to a form cannot be a refusal"
_NOT_KEPT = "nothing is kept of a request; send the whole conversation"
_NOT_WRITTEN = "it would change what the model reads after it was written by its own template"

_COLD = 0.01  # logits over less than this can be infinite

#: Fields of other servers and of OpenAI's that are refused, and why.
REFUSED = {
    "prompt": "a prompt without turns has no request to judge",
    "prompt_embeds": "a prompt without text cannot be judged",
    "prompt_token_ids": "a prompt without text cannot be judged",
    "messages_embeds": "a prompt without text cannot be judged",
    "chat_template": _NOT_WRITTEN,
    "chat_template_kwargs": _NOT_WRITTEN,
    "add_generation_prompt": _NOT_WRITTEN,
    "continue_final_message": "an answer that is begun in the request is not gone on with",
    "add_special_tokens": _NOT_WRITTEN,
    "documents": _NOT_WRITTEN,
    "mm_processor_kwargs": _NOT_WRITTEN,
    "prediction": "an answer that is begun in the request is not gone on with",
    "logit_bias": _AROUND,
    "logits_processors": _AROUND,
    "allowed_token_ids": _AROUND,
    "bad_words": _AROUND,
    "bad_words_ids": _AROUND,
    "suppress_tokens": _AROUND,
    "sequence_bias": _AROUND,
    "generation_config": _AROUND,
    "min_tokens": _AROUND,
    "ignore_eos": _AROUND,
    "stop_token_ids": _AROUND,
    "repetition_penalty": _AROUND,
    "vllm_xargs": _AROUND,
    "guided_json": _GRAMMAR,
    "guided_regex": _GRAMMAR,
    "guided_choice": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "guided_decoding_backend": _GRAMMAR,
    "structured_outputs": _GRAMMAR,
    "grammar": _GRAMMAR,
    "json_schema": _GRAMMAR,
    "regex": _GRAMMAR,
    "ebnf": _GRAMMAR,
    "use_beam_search": "answers are sampled, or the likeliest token is taken",
    "best_of": "answers are sampled, or the likeliest token is taken",
    "lora_request": "the guard is fitted for the model as it was loaded",
    "audio": "answers are text",
    "previous_response_id": _NOT_KEPT,
    "conversation": _NOT_KEPT,
    "reasoning": "how the model thinks is for its template to say",
    "functions": "it was replaced by 'tools'",
    "function_call": "it was replaced by 'tool_choice'",
}


class StreamOptions(Wire):
    """What a stream brings beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GuardOptions(Wire):
    """What of the guard's work is shown; what it does cannot be asked for."""

    receipt: Literal["full", "none"] = "full"


class ResponseFormat(Wire):
    """Text: an answer that is held to a form cannot be a refusal."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(Conversation):
    """A request to `/v1/chat/completions`."""

    model: str
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = Field([])
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    guard: GuardOptions = GuardOptions()
    response_format: ResponseFormat = ResponseFormat(type="text")
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] = False
    user: str | None = None  # taken for the clients that send them, and not used
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] = False

    @property
    def wanted_tokens(self) -> int | None:
        """The length that is asked for."""
        given = (self.max_completion_tokens, self.max_tokens)
        return min((number for number in given if number is not None), default=None)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude={"function": {"strict"}}) for tool in self.tools]

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        if self.temperature is None and self.top_p is None:
            return Sampling(seed=self.seed)
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature == 0:
            return Sampling(temperature=0.0)
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(max(temperature, _COLD), top_p, self.seed)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; requests that choose alike can share a batch.

    Attributes:
        temperature: 0 takes the likeliest; None is as the model's makers set it.
        top_p: of the likeliest tokens, those that make up this share of probability.
        seed: of the random numbers; None for any.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For `generate`."""
        if self.temperature is None:
            return {}
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,  # of all tokens
        }


T = TypeVar("T")
Several = Annotated[list[T], Field(min_length=1)]


class ModerationRequest(Wire):
    """A request to `/v1/moderations`: texts, each by itself, or the parts of one message."""

    input: str | Several[str] | Several[Part]
    model: str | None = None

    @property
    def conversations(self) -> list[Conversation]:
        """One for each verdict."""
        if isinstance(self.input, str):
            return [_user(self.input)]
        if isinstance(self.input[0], str):
            return [_user(text) for text in self.input]
        return [_user(self.input)]


class GuardrailRequest(BaseModel):
    """A request of LiteLLM's generic guardrail API; what else its releases send is not used."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    input_type: Literal["request"]  # the gate judges what is asked, not answers
    texts: list[str] | None = None
    images: list[str] | None = None
    structured_messages: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _holds_a_request(self) -> Self:
        if not (self.structured_messages or self.texts or self.images):
            raise ValueError("there is nothing to judge: no texts, images or messages")
        return self

    @property
    def conversations(self) -> list[Conversation]:
        """What is to be judged: the conversation if it is given, else each text with all images."""
        if self.structured_messages:
            return [Conversation.model_validate({"messages": self.structured_messages})]
        images = [{"type": "image_url", "image_url": {"url": image}} for image in self.images or []]
        if not self.texts:
            return [_user(images)]
        return [_user([*images, {"type": "text", "text": text}]) for text in self.texts]


def _user(content: Any) -> Conversation:
    """A conversation of one message of the user."""
    return Conversation.model_validate({"messages": [{"role": "user", "content": content}]})
