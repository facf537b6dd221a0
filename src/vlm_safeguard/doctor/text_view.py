"""Whether the text-only view is the chat template's own text without the media."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_safeguard.doctor.conversations import Messages, conversations
from vlm_safeguard.doctor.subject import Subject, require
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.conversation import (
    encode_messages,
    letters,
    noise_media,
    render_chat,
    tokenizer_of,
    without_media,
)
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.policy.text_view import TextView
from vlm_safeguard.policy.token_ids import same_start

_TYPED = "a typed placeholder"


def text_only_view(subject: Subject) -> str:
    """The view equals what the chat template writes for the conversation without its media."""
    processor = subject.processor
    view = learn_text_view(processor, subject.backbone.placeholder_ids)
    # a processor without a chat template takes one turn only
    needed = ("one image", "two turns") if processor.chat_template else ("one image",)
    equal: list[str] = []
    spaced: list[str] = []
    not_taken: list[str] = []
    for name, messages in conversations(view.kinds):
        try:
            row, plain = _with_and_without_media(subject, messages)
        except (SafeguardError, ValueError) as error:
            if name in needed:
                raise
            not_taken.append(f"{name} ({str(error).splitlines()[0][:60]})")
            continue
        (equal if _is_equal(subject, name, view(row), plain) else spaced).append(name)
    for token in sorted(subject.backbone.placeholder_ids):
        _check_typed(subject, view, token)
    refused = sorted({kind for clip in view.clips for kind in clip.kinds} - view.kinds)
    parts: dict[str, Sequence[str]] = {
        "equal token for token": [*equal, _TYPED],
        "but for white space": spaced,
        "refused in a request": refused,
        "not taken by the template": not_taken,
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _with_and_without_media(subject: Subject, messages: Messages) -> tuple[list[int], list[int]]:
    """A conversation's token ids with media of noise, and the template's own without."""
    processor = subject.processor
    plain = encode_messages(processor, without_media(messages))
    return encode_messages(processor, messages, noise_media(processor, messages)), plain


def _is_equal(subject: Subject, name: str, text: list[int], plain: list[int]) -> bool:
    """Whether two texts are the same tokens; else only their white space may differ."""
    tokenizer = tokenizer_of(subject.processor)
    require(
        text == plain or letters(tokenizer, text) == letters(tokenizer, plain),
        f"{name}: the view has {len(text)} tokens, the template's own text {len(plain)}; "
        f"first difference at {same_start(text, plain)}",
    )
    return text == plain


def _check_typed(subject: Subject, view: TextView, token: int) -> None:
    """A placeholder that a user types is taken out, or refused."""
    tokenizer = tokenizer_of(subject.processor)
    literal = tokenizer.decode([token])
    request = render_chat(subject.processor, f"What does {literal} mean?")
    try:
        stays = token in view(tokenizer(request)["input_ids"])
    except SafeguardError:  # a typed placeholder of a video or an audio is refused
        stays = False
    require(not stays, f"a typed {literal!r} stays in the text-only view")
