"""Conversations as inspect-ai's messages, and back."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    Content,
    ContentImage,
    ContentText,
)
from PIL import Image

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.batches import Position
from vlm_safeguard.evaluation.asks.images import data_url
from vlm_safeguard.loading import load_image
from vlm_safeguard.model.conversation import Chat, Turn, request_text

_POSITION = "vlm_safeguard_place"  # in a message's metadata: set, number and total
_MESSAGES = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


def messages_of(chat: Chat, position: Position | None = None) -> list[ChatMessage]:
    """A conversation as inspect's messages, images within as PNG.

    Args:
        position: where it stands in its set, for a vlm-safeguard model to batch it by.
    """
    written = []
    for turn in chat:
        content = [
            ContentText(text=part) if isinstance(part, str) else ContentImage(image=data_url(part))
            for part in turn.content
        ]
        message: ChatMessage = _MESSAGES[turn.role](content=content)
        written.append(message)
    if position is not None:
        written[-1].metadata = {_POSITION: [position.of, position.number, position.total]}
    return written


def chat_of_messages(messages: Sequence[ChatMessage]) -> Chat:
    """Inspect's messages as a conversation, images loaded.

    Raises:
        SafeguardError: a message that is neither text nor image, or no user's turn.
    """
    turns = []
    for message in messages:
        if message.role == "tool":
            raise SafeguardError("A vlm-safeguard model takes no tools' messages.")
        parts = [message.content] if isinstance(message.content, str) else message.content
        content = tuple(part if isinstance(part, str) else _part(part) for part in parts)
        turns.append(Turn(message.role, content))
    request_text(chat := tuple(turns))  # raises where nobody asks
    return chat


def _part(content: Content) -> str | Image.Image:
    if isinstance(content, ContentText):
        return content.text
    if not isinstance(content, ContentImage):
        raise SafeguardError(f"A vlm-safeguard model reads text and images, not {content.type}.")
    if not content.image.startswith("data:"):
        if "://" in content.image:
            raise SafeguardError(f"The image {content.image} is not on this machine; fetch it.")
        return load_image(Path(content.image))
    try:
        data = base64.b64decode(content.image.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (binascii.Error, OSError) as error:
        raise SafeguardError(f"An image in the request cannot be read: {error}") from error


def position_of(messages: Sequence[ChatMessage]) -> Position | None:
    """Where a task says that its request stands."""
    for message in reversed(messages):
        if message.metadata and _POSITION in message.metadata:
            return Position(*message.metadata[_POSITION])
    return None
