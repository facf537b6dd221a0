"""Conversations as a model's processor writes and encodes them, with images and without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from jinja2 import TemplateError
from transformers import BatchFeature

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.families import SELF_PROMPTING
from vlm_safeguard.model.media import Shown, noise_audios, noise_videos
from vlm_safeguard.policy.media import KINDS

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class Turn:
    """What one side says: texts and images, in order."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | Image, ...]


Chat = tuple[Turn, ...]


def chat_of(text: str, *images: Image) -> Chat:
    """A conversation of one user turn, its images first."""
    return (Turn("user", (*images, text)),)


def request_text(chat: Chat) -> str:
    """The text of the last user turn, its parts on lines of their own.

    Raises:
        SafeguardError: no turn is the user's.
    """
    return "\n".join(part for part in chat[_request(chat)].content if isinstance(part, str))


def rephrased(chat: Chat, text: str) -> Chat:
    """`chat` with `text` for all text of the last user turn; the turn's images come first.

    Raises:
        SafeguardError: no turn is the user's.
    """
    place = _request(chat)
    shown = tuple(part for part in chat[place].content if not isinstance(part, str))
    return (*chat[:place], Turn("user", (*shown, text)), *chat[place + 1 :])


def unseen(chat: Chat) -> Chat:
    """`chat` without any images."""
    return tuple(
        replace(turn, content=tuple(part for part in turn.content if isinstance(part, str)))
        for turn in chat
    )


def images_of(chat: Chat) -> list[Image]:
    """The images of all turns, in order."""
    return [part for turn in chat for part in turn.content if not isinstance(part, str)]


def _request(chat: Chat) -> int:
    """Where the last user turn stands."""
    for place in reversed(range(len(chat))):
        if chat[place].role == "user":
            return place
    raise SafeguardError("The conversation has no turn of the user, so there is nothing to answer.")


def _messages(chat: Chat) -> list[dict[str, Any]]:
    """A conversation as chat templates take it."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.content
            ],
        }
        for turn in chat
    ]


def user_turn(text: str, *, images: int = 0) -> dict[str, Any]:
    """A message of the user: images, then text."""
    return user_message(*["image"] * images, text)


def answer_turn(text: str) -> dict[str, Any]:
    """A message of the assistant."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def user_message(*parts: str) -> dict[str, Any]:
    """A message of the user: `image`, `video` and `audio` stand for these, all else is text."""
    return {
        "role": "user",
        "content": [
            {"type": part} if part in KINDS else {"type": "text", "text": part} for part in parts
        ],
    }


def without_media(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with its texts alone."""
    return [
        {**turn, "content": [item for item in turn["content"] if item["type"] == "text"]}
        for turn in messages
    ]


def noise_media(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> Shown:
    """Media of noise for a conversation's placeholders, of different sizes and lengths."""
    count = Counter(item["type"] for turn in messages for item in turn["content"])
    videos, audios = noise_videos()[::-1], noise_audios(processor)
    return Shown(
        images=[noise_image(number).resize((96, 64)) for number in range(count["image"])],
        videos=[videos[number % len(videos)] for number in range(count["video"])],
        audios=[audios[number % len(audios)] for number in range(count["audio"])],
    )


def render_messages(
    processor: ProcessorMixin, messages: list[dict[str, Any]], **options: Any
) -> str:
    """A conversation as the chat template writes it, ready for the answer.

    Args:
        options: for the template ("enable_thinking"), or how it is to end.

    Raises:
        SafeguardError: the processor cannot render it.
    """
    if _self_prompting(processor) and not processor.chat_template:
        return _one_turn(processor, messages)
    try:
        rendered: str = processor.apply_chat_template(
            messages, tokenize=False, **{"add_generation_prompt": True, **options}
        )
    except (ValueError, TypeError, AttributeError, TemplateError) as error:
        raise SafeguardError(f"The processor cannot render a conversation: {error}") from error
    return rendered


def takes_turns(processor: ProcessorMixin) -> bool:
    """Whether it can write a conversation that goes on behind an answer."""
    try:
        render_messages(processor, [user_turn("Hello"), answer_turn("Hello"), user_turn("Hello")])
    except SafeguardError:
        return False
    return True


def render_chat(processor: ProcessorMixin, text: str, *, images: int = 0) -> str:
    """One user turn as the chat template writes it, images first, ready for the answer."""
    return render_messages(processor, [user_turn(text, images=images)])


def encode_messages(
    processor: ProcessorMixin,
    messages: list[dict[str, Any]],
    shown: Shown | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation in the chat template, its media expanded by the processor.

    Args:
        options: as for `render_messages`.

    Raises:
        SafeguardError: the processor cannot read it.
    """
    row: list[int] = encode_shown(processor, messages, shown, **options)["input_ids"][0].tolist()
    return row


def encode_shown(
    processor: ProcessorMixin,
    messages: list[dict[str, Any]],
    shown: Shown | None = None,
    **options: Any,
) -> BatchFeature:
    """A batch of one conversation in the chat template, with its media.

    Args:
        options: as for `render_messages`.

    Raises:
        SafeguardError: the processor cannot read it.
    """
    rendered = render_messages(processor, messages, **options)
    shown = shown or Shown()
    try:
        return _encode(processor, [rendered], [shown.images], **shown.arguments())
    except (ValueError, TypeError) as error:
        raise SafeguardError(
            f"The processor cannot read a conversation with {len(shown.images)} images, so its "
            f"text-only view cannot be learnt: {str(error).splitlines()[0]}"
        ) from error


def encode_chat(
    processor: ProcessorMixin, text: str, *, images: int = 0, size: tuple[int, int] = (64, 64)
) -> list[int]:
    """Token ids of one user turn in the chat template, ready for the answer.

    Args:
        images: how many of noise come before the text, as the processor expands them.
        size: of the images, width and height in pixels.

    Raises:
        SafeguardError: the processor has no chat template.
    """
    noise = [noise_image(number).resize(size) for number in range(images)]
    return encode_messages(processor, [user_turn(text, images=images)], Shown(noise))


def encode_batch(
    processor: ProcessorMixin, questions: Sequence[str], images: Sequence[Sequence[Image]]
) -> BatchFeature:
    """Questions of one turn each, behind their images, as a left-padded batch for `generate`."""
    return encode_chats(
        processor,
        [chat_of(question, *shown) for question, shown in zip(questions, images, strict=True)],
    )


def encode_chats(processor: ProcessorMixin, chats: Sequence[Chat]) -> BatchFeature:
    """Conversations as a left-padded batch for `generate`, ready for the answer.

    Where the last turn is the assistant's, its text is what the answer begins with.

    Raises:
        SafeguardError: the processor cannot render one, or takes images for all or none.
    """
    rendered = [_render_begun(processor, chat) for chat in chats]
    return encode_rendered(processor, rendered, [images_of(chat) for chat in chats])


def encode_rendered(
    processor: ProcessorMixin, rendered: list[str], images: Sequence[Sequence[Image]]
) -> BatchFeature:
    """What `render_messages` wrote, with each one's images, as a left-padded batch.

    Raises:
        SafeguardError: the processor takes images for all or none.
    """
    return _encode(processor, rendered, images, padding=True, padding_side="left")


def _render_begun(processor: ProcessorMixin, chat: Chat) -> str:
    """A conversation as the template writes it, and behind it what its answer begins with."""
    *before, last = chat
    if last.role != "assistant":
        return render_messages(processor, _messages(chat))
    begun = "".join(part for part in last.content if isinstance(part, str))
    return render_messages(processor, _messages(tuple(before))) + begun


def _encode(
    processor: ProcessorMixin,
    rendered: list[str],
    images: Sequence[Sequence[Image]],
    **options: Any,
) -> BatchFeature:
    """Rendered conversations as the processor encodes them; none gets a second bos token."""
    if _self_prompting(processor) and not all(images):
        if any(images):
            raise SafeguardError("The processor takes images for all of a batch or for none.")
        return _encode_unseen(processor, rendered, **options)
    bos = getattr(tokenizer_of(processor), "bos_token", None)
    batch: BatchFeature = processor(
        text=rendered,
        images=[list(shown) for shown in images] if any(images) else None,
        return_tensors="pt",
        add_special_tokens=not (bos and rendered[0].startswith(bos)),
        **options,
    )
    batch.pop("labels", None)  # PaliGemma's writes empty ones, for training
    return batch


def _encode_unseen(processor: Any, rendered: list[str], **options: Any) -> BatchFeature:
    """Texts as a processor that demands an image writes them behind one, which is cut off."""
    marked = [processor.image_token + text for text in rendered]
    batch = _encode(processor, marked, [[noise_image(0)]] * len(marked), **options)
    kept = batch["input_ids"] != processor.image_token_id
    return BatchFeature(
        {
            name: values[kept].view(len(rendered), -1)
            for name, values in batch.items()
            if values.shape == kept.shape
        }
    )


def _one_turn(processor: Any, messages: list[dict[str, Any]]) -> str:
    """The text of a conversation's only turn behind its image tokens, for its own processor."""
    if [turn["role"] for turn in messages] != ["user"]:
        raise SafeguardError("The processor has no chat template: it reads one user turn only.")
    content = messages[0]["content"]
    images: list[str] = [processor.image_token for item in content if item["type"] == "image"]
    words: list[str] = [item["text"] for item in content if item["type"] == "text"]
    return "".join(images + words)


def _self_prompting(processor: ProcessorMixin) -> bool:
    return any(kind.__name__ in SELF_PROMPTING for kind in type(processor).__mro__)


def letters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text without its white space, which tokenizers fuse with what is around it."""
    return "".join(str(tokenizer.decode(list(ids))).split())


def tokenizer_of(processor: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The processor's tokenizer, which is the processor itself where it has no other part."""
    return cast("PreTrainedTokenizerBase", getattr(processor, "tokenizer", processor))
