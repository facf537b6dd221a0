"""What media become in a prompt, learnt from the model's processor: the text-only view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.clips import learn_clips
from vlm_safeguard.model.conversation import (
    encode_chat,
    encode_messages,
    noise_media,
    tokenizer_of,
    user_message,
    without_media,
)
from vlm_safeguard.policy.text_view import TextView, one_a_number
from vlm_safeguard.policy.token_ids import same_start

if TYPE_CHECKING:
    from transformers import ProcessorMixin

#: The option by which Qwen's templates number images and videos.
_NUMBERED = "add_vision_id"
_PROBES = ("What is shown here?", "Describe it in one word.")
#: Images to show: how many, and their width and height; large ones may be cut into tiles.
_PICTURES = ((1, (64, 64)), (1, (300, 100)), (1, (500, 700)), (2, (64, 64)), (3, (64, 64)))


def learn_text_view(processor: ProcessorMixin, placeholder_ids: frozenset[int]) -> TextView:
    """Read off what media become in a prompt, by asking questions with and without them.

    A placeholder that stands in no image, video or audio as the processor writes them is refused.

    Args:
        placeholder_ids: tokens that stand for media of any kind.

    Raises:
        SafeguardError: the template puts no image token into a conversation with an image.
    """
    shown = [
        (
            count,
            encode_chat(processor, question),
            encode_chat(processor, question, images=count, size=size),
        )
        for question in _PROBES
        for count, size in _PICTURES
    ]
    if not all(placeholder_ids & set(ids) for _, _, ids in shown):
        raise SafeguardError(
            "The processor's chat template puts no image token into a conversation that "
            f"has an image (looked for ids {sorted(placeholder_ids)}): processor and "
            "model do not belong together."
        )
    special = _special_ids(processor).difference(*(plain for _, plain, _ in shown))
    chunks = []
    for count, plain, ids in shown:
        prefix = same_start(plain, ids)
        suffix = same_start(plain[prefix:][::-1], ids[::-1])
        chunks.append((count, ids[prefix : len(ids) - suffix]))
    frame = special.intersection(token for _, chunk in chunks for token in chunk)
    seen = placeholder_ids.intersection(token for _, chunk in chunks for token in chunk)
    numbers = _number_ids(processor)
    view = TextView(placeholder_ids, frame - placeholder_ids, number_ids=numbers, image_ids=seen)
    # what stands inside one image; if that does not explain several (numbered ones), in all
    for most in (1, max(count for count, _ in chunks)):
        gaps = [
            chunk[stop:start]
            for count, chunk in chunks
            if count <= most
            for (_, stop), (start, _) in pairwise(view.marks(chunk))
        ]
        view = replace(
            view,
            glue_ids=frozenset(token for gap in gaps for token in gap),
            glue_length=max((len(one_a_number(gap, numbers)) for gap in gaps), default=0),
        )
        singles = [(plain, ids) for count, plain, ids in shown if count == 1]
        view = _with_wrapper(view, [singles[0], singles[-1]])
        view = replace(view, exact=all(view(ids) == plain for _, plain, ids in shown))
        if view.exact:
            break
    view = replace(view, counted=_counted(view, chunks))
    view = _with_labels(processor, learn_clips(processor, view, _special_ids(processor)))
    patterns = [(*clip.head, *clip.unit, *clip.tail) for clip in view.clips] + [*view.labels]
    written = {*view.glue_ids, *view.before, *(token for tokens in patterns for token in tokens)}
    return view if written & numbers else replace(view, number_ids=frozenset())


def _counted(view: TextView, chunks: Sequence[tuple[int, list[int]]]) -> tuple[int, int] | None:
    """A token that every image has as often, whatever its size, and how often that is."""
    _, first = chunks[0]
    inside = [token for start, stop in view.marks(first) for token in first[start:stop]]
    for token in sorted(set(inside), key=lambda token: (inside.count(token), token)):
        if all(chunk.count(token) == count * first.count(token) for count, chunk in chunks):
            return token, first.count(token)
    return None


def _with_labels(processor: ProcessorMixin, view: TextView) -> TextView:
    """The view, with the labels that the template writes before media if asked to number them."""
    if _NUMBERED not in str(processor.chat_template):
        return view
    labels: set[tuple[int, ...]] = set()
    asked = []
    for kind in sorted(view.kinds):
        for parts in ((kind, _PROBES[0]), (kind, kind, _PROBES[1])):
            messages = [user_message(*parts)]
            shown = noise_media(processor, messages)
            bare = encode_messages(processor, messages, shown)
            numbered = encode_messages(processor, messages, shown, **{_NUMBERED: True})
            asked.append((numbered, encode_messages(processor, without_media(messages))))
            if parts.count(kind) == 1:
                prefix = same_start(bare, numbered)
                labels.add(tuple(numbered[prefix : prefix + len(numbered) - len(bare)]))
    labelled = replace(view, labels=tuple(sorted(labels)))
    return labelled if all(labelled(ids) == plain for ids, plain in asked) else view


def _with_wrapper(view: TextView, shown: Sequence[tuple[list[int], list[int]]]) -> TextView:
    """The view, with the ordinary tokens around one image as two different questions show it.

    Where the tokenizer fuses text with its neighbours, the wrapper is what both share.
    """
    befores, afters, insteads = [], [], []
    for plain, ids in shown:
        images = list(view.images(ids))
        start, stop = images[0][0], images[-1][1]
        prefix = same_start(ids[:start], plain)
        room = min(len(ids) - stop, len(plain) - prefix)
        suffix = same_start(ids[::-1][:room], plain[::-1][:room])
        befores.append(ids[prefix:start])
        afters.append(ids[stop : len(ids) - suffix])
        insteads.append(plain[prefix : len(plain) - suffix])
    before = same_start(befores[0][::-1], befores[1][::-1])
    after = same_start(*afters)
    return replace(
        view,
        before=tuple(befores[0][len(befores[0]) - before :]),
        after=tuple(afters[0][:after]),
        instead=tuple(insteads[0]) if insteads[0] == insteads[1] else (),
    )


def _special_ids(processor: ProcessorMixin) -> frozenset[int]:
    """Tokens that stand for more than their text: special and added ones."""
    tokenizer = tokenizer_of(processor)
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def _number_ids(processor: ProcessorMixin) -> frozenset[int]:
    """Tokens that write digits and nothing else."""
    vocabulary = tokenizer_of(processor).get_vocab()
    return frozenset(
        index for token, index in vocabulary.items() if token.strip("\u0120\u2581 ").isdigit()
    )
