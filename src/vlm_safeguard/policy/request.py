"""One request as a guard reads it, whatever engine runs it: its text, and the tokens of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_safeguard.policy.media import Media
from vlm_safeguard.policy.span import Span
from vlm_safeguard.policy.text_view import TextView


@dataclass(frozen=True)
class Request:
    """Read once from a prompt's token ids.

    Attributes:
        text: token ids of the request without its media.
        spanned: (position in the prompt, its counterpart's place in `text`) of each prompt token
            that an edit may touch, in order; the last one's is always among them.
        last: position of the token whose state the decision is taken from.
        media: the images, videos and audios that were taken out.
    """

    text: tuple[int, ...]
    spanned: tuple[tuple[int, int], ...]
    last: int
    media: Media


def read_request(view: TextView, span: Span, prompt: Sequence[int]) -> Request:
    """Read a prompt's token ids, without padding.

    Raises:
        ValueError: it holds no text.
        SafeguardError: it holds a medium whose text-only view is not known.
    """
    text, origins = view.aligned(prompt)
    if not text:
        raise ValueError("it holds no text to judge")
    first = len(prompt) if span is Span.LAST else view.first_medium(prompt)
    last = len(prompt) - 1
    spanned = {
        origin: place
        for place, origin in enumerate(origins)
        if origin is not None and origin >= first
    }
    spanned[last] = len(text) - 1
    return Request(tuple(text), tuple(sorted(spanned.items())), last, view.media(prompt))
