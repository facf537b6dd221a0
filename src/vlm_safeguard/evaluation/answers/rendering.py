"""Conversations as the chat template of any language model writes them.

Templates read a turn's content either as a list of parts (those of processors, Llama Guard 3 1B)
or as one string (most tokenizers'). Given the wrong one, many fail silently: they write nothing,
or the list as Python prints it. So each is tried on words that are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.conversation import Chat, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


def render_chats(
    processor: PreTrainedTokenizerBase | ProcessorMixin, chats: Sequence[Chat]
) -> list[str]:
    """Conversations of text and images as the template writes them, ready for the next answer.

    Raises:
        SafeguardError: no chat template, or one that does not write all of such a conversation.
    """
    parts = {
        roles: _takes_parts(processor, roles)
        for roles in {tuple(turn.role for turn in chat) for chat in chats}
    }
    return [_render(processor, chat, parts[tuple(turn.role for turn in chat)]) for chat in chats]


def opens_itself(tokenizer: PreTrainedTokenizerBase, rendered: str) -> bool:
    """Whether the template has already written the token that a text begins with."""
    bos = tokenizer.bos_token
    return bool(bos) and rendered.startswith(str(bos))


def longest(model: PreTrainedModel) -> int:
    """Tokens that a model can read, or a number never reached where its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else 1 << 30


def _takes_parts(
    processor: PreTrainedTokenizerBase | ProcessorMixin, roles: tuple[str, ...]
) -> bool:
    """Whether the template reads content as parts (True) or as a string (False)."""
    words = [f"the words of turn {number}" for number in range(len(roles))]
    probe: Any = tuple(Turn(role, (text,)) for role, text in zip(roles, words, strict=True))  # type: ignore[arg-type]
    errors = []
    for parts in (True, False):
        try:
            written = _render(processor, probe, parts)
        except SafeguardError as error:
            errors.append(str(error))
            continue
        printed = any(f"{quote}type{quote}" in written for quote in "'\"")  # the list itself
        if all(text in written for text in words) and not printed:
            return parts
    raise SafeguardError(
        f"The model's chat template does not write the turns {', '.join(roles)} of a "
        f"conversation, so it cannot be asked. {' '.join(errors)}".strip()
    )


def _render(processor: PreTrainedTokenizerBase | ProcessorMixin, chat: Chat, parts: bool) -> str:
    messages = [
        {"role": turn.role, "content": _parts(turn) if parts else _string(turn)} for turn in chat
    ]
    try:
        rendered: str = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except (ValueError, TypeError, AttributeError, TemplateError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SafeguardError(f"Its chat template failed: {reason}") from error
    return rendered


def _parts(turn: Turn) -> list[dict[str, str]]:
    return [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image"}
        for item in turn.content
    ]


def _string(turn: Turn) -> str:
    if not all(isinstance(item, str) for item in turn.content):
        raise SafeguardError("Its chat template has no place for images.")
    return "\n".join(item for item in turn.content if isinstance(item, str))
