"""A conversation as the model reads it: written by its own template, and checked for its length."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta
from PIL.Image import Image

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import input_device
from vlm_safeguard.model.conversation import encode_rendered, render_messages, tokenizer_of
from vlm_safeguard.model.text_rows import text_rows
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.messages import Conversation, texts_in

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedTokenizerBase

_log = logging.getLogger("vlm_safeguard.serving")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model is given.

    Attributes:
        text: as the chat template writes it.
        images: whose places are in it, in order.
        ids: its tokens, those of images among them.
    """

    text: str
    images: tuple[Image, ...]
    ids: tuple[int, ...]


class Writer:
    """Writes prompts for a model, in any thread, one at a time: tokenizers keep settings."""

    def __init__(self, vlm: VLM, max_tokens: int) -> None:
        """Of at most `max_tokens`, and no more than the model reads."""
        self._vlm = vlm
        self._backbone = vlm.backbone
        self._lock = threading.Lock()
        context = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = context if isinstance(context, int) and context > 0 else None
        self.max_tokens = max_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self._vlm.tokenizer

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the model's chat template writes tools."""
        template = self._vlm.processor.chat_template
        templates = template.values() if isinstance(template, dict) else [template or ""]
        try:
            trees = [
                Environment(extensions=["jinja2.ext.loopcontrols"]).parse(each)
                for each in templates
            ]
        except TemplateError:
            return False
        return any("tools" in meta.find_undeclared_variables(tree) for tree in trees)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """Tokens that part turns or stand for media, which no text may bring."""
        tokenizer: Any = tokenizer_of(self._vlm.processor)
        added = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        named = [getattr(self._vlm.processor, f"{kind}_token", None) for kind in _MEDIA]
        names = {*added, *tokenizer.all_special_tokens, *named}
        return tuple(name for name in names if isinstance(name, str) and name.strip())

    def write(
        self,
        conversation: Conversation,
        images: Sequence[Image],
        tools: Sequence[dict[str, Any]] = (),
    ) -> Prompt:
        """The prompt of a conversation, ready for the answer.

        Raises:
            ApiError: it holds tokens that part turns, is too long, or cannot be written.
        """
        messages, shown = conversation.written(), list(tools)
        _check_characters([messages, shown])
        calls = [message.get("tool_calls") for message in messages]
        for call in texts_in([shown, calls]):  # which stand apart in every template
            self._check_special(call, "")
        if (tools or conversation.uses_tools) and not self.takes_tools:
            raise ApiError(
                "This model's chat template takes no tools.",
                param="tools" if tools else "messages",
                code="tools_not_supported",
            )
        try:
            with self._lock:
                text = self._rendered(messages, shown)
                self._check_special(text, self._rendered(_neutral(messages), shown))
                encoded = encode_rendered(self._vlm.processor, [text], [images])
        except ApiError:
            raise
        except SafeguardError as error:
            raise _unreadable(str(error)) from error
        except Exception as error:  # templates and processors are code of many makers
            _log.warning("unreadable request", extra={"kind": type(error).__name__})
            raise _unreadable("its messages or images are not as the model wants them") from error
        prompt = Prompt(text, tuple(images), tuple(encoded["input_ids"][0].tolist()))
        self._check_length(prompt)
        return prompt

    def encode(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """A left-padded batch for `generate`, images and all, where the model wants it."""
        model = self._vlm.model
        with self._lock:
            batch = encode_rendered(
                self._vlm.processor,
                [prompt.text for prompt in prompts],
                [prompt.images for prompt in prompts],
            )
        return batch.to(input_device(model), model.dtype)

    def encode_ids(
        self, prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]]
    ) -> dict[str, torch.Tensor]:
        """The same of token ids alone, and of what each answer begins with."""
        pad = self.tokenizer.pad_token_id
        return text_rows(self._backbone, prompts, begun, pad=pad if isinstance(pad, int) else 0)

    def room(self, prompt: Prompt) -> int | None:
        """How many tokens an answer can have; None where that is not known."""
        return None if self.context is None else self.context - len(prompt.ids)

    def _check_length(self, prompt: Prompt) -> None:
        limit = min(self.max_tokens, self.context - 1 if self.context else self.max_tokens)
        if len(prompt.ids) > limit:
            raise ApiError(
                f"The prompt has {len(prompt.ids)} tokens, its images' among them; it may have "
                f"{limit}.",
                param="messages",
                code="context_length_exceeded",
            )

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        options: dict[str, Any] = {"tools": tools} if tools else {}
        return render_messages(self._vlm.processor, messages, **options)

    def _check_special(self, text: str, neutral: str) -> None:
        """Refuse texts that bring turns or images of their own, in one piece or in several.

        Args:
            neutral: the prompt with other texts, which has as many of both.
        """
        for token in self._special:
            if text.count(token) != neutral.count(token):
                raise ApiError(
                    f"A text makes {token!r}, which stands for a turn or an image in this model's "
                    "prompts. Leave it out, or write it in another way.",
                    param="messages",
                    code="special_token",
                )


def _neutral(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with other texts."""
    return [
        {
            **message,
            "content": [
                {"type": "text", "text": "x"} if part["type"] == "text" and part["text"] else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _check_characters(value: Any) -> None:
    for text in texts_in(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _unreadable("a text holds half of a character") from None


_MEDIA = ("image", "video", "audio", "boi", "eoi")


def _unreadable(reason: str) -> ApiError:
    message = f"The request cannot be written for this model: {reason.rstrip('.')}."
    return ApiError(message, param="messages", code="unreadable_request")
