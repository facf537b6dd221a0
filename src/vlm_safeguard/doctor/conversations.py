"""Conversations with media of every kind that a model takes, in every place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_safeguard.doctor.subject import QUESTIONS
from vlm_safeguard.model.conversation import user_message
from vlm_safeguard.policy.media import KINDS, Kind

Messages = list[dict[str, Any]]


def conversations(kinds: frozenset[Kind]) -> Iterator[tuple[str, Messages]]:
    """Named conversations with media of these kinds."""
    ask, more = QUESTIONS
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Bread needs flour."}]}
    system = {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}
    for kind in KINDS:
        if kind not in kinds:
            continue
        yield f"one {kind}", [user_message(kind, ask)]
        yield f"two {kind}s", [user_message(kind, kind, more)]
        yield (
            "interleaved" if kind == "image" else f"interleaved {kind}s",
            [user_message("Look at", kind, "and then at", kind, "please.")],
        )
        if kind == "image":
            yield "two turns", [user_message(kind, ask), reply, user_message(more)]
        yield f"{kind} in the second turn", [user_message(ask), reply, user_message(kind, more)]
        if kind == "image":
            yield "system prompt", [system, user_message(kind, ask)]
        else:
            yield f"image and {kind}", [user_message("image", kind, ask)]
            yield f"{kind} and image", [user_message(kind, "image", ask)]
    if kinds == {*KINDS}:
        yield "video and audio", [user_message("video", "audio", ask)]
