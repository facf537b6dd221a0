"""What a video and an audio become in a prompt, learnt from the model's processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.conversation import (
    encode_messages,
    letters,
    render_messages,
    tokenizer_of,
    user_message,
    without_media,
)
from vlm_safeguard.model.media import Shown, noise_audios, noise_videos
from vlm_safeguard.policy.media import Clip, Kind

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from vlm_safeguard.policy.text_view import TextView

#: Around a clip: at the start of its turn, between texts, and at the end.
_AROUND = (
    (("", "What is shown here?"), ("", "Describe it in one word.")),
    (("Look at this.\n", "What is shown here?"), ("Here:\n", "Describe it in one word.")),
    (("What is shown here?", ""), ("Describe it in one word.", "")),
)
_KINDS: tuple[tuple[Kind, ...], ...] = (("video",), ("video", "audio"), ("audio",))
#: What a processor has that reads a video's sound with it.
_WITH_SOUND = "replace_video_with_audio_token"


def learn_clips(
    processor: ProcessorMixin,
    view: TextView,
    special_ids: frozenset[int],
    number_ids: frozenset[int],
) -> TextView:
    """`view` with what videos and audio become, as this processor writes them.

    A kind that it cannot show, or whose form fits no pattern, is refused: by its placeholder, or
    where it takes an image's, by what else stands there.

    Args:
        view: of images.
        special_ids: tokens that stand for more than their text.
        number_ids: tokens that write digits.
    """
    clips: list[Clip] = []
    for kinds in _KINDS:
        if "audio" in kinds and kinds != ("audio",) and not hasattr(processor, _WITH_SOUND):
            continue
        shown = _shown(processor, kinds)
        learnt = [
            clip
            for texts in _AROUND
            if (clip := _clip(processor, view, special_ids, number_ids, kinds, texts, shown))
        ]
        learnt += [_bare(processor, clip) for clip in learnt if clip.instead]
        tried = replace(view, clips=_in_order([*clips, *learnt]), number_ids=number_ids)
        if learnt and _holds(processor, tried, kinds, shown):
            clips += learnt
        else:
            clips += _refused(processor, view, special_ids, number_ids, kinds, shown)
    alone = view.placeholder_ids - (view.image_ids or frozenset())
    clips += [_alone(processor, token) for token in sorted(alone)]
    return replace(view, clips=_in_order(clips))


def _shown(processor: ProcessorMixin, kinds: tuple[Kind, ...]) -> list[Shown]:
    """Media of these kinds in several sizes, one each."""
    waves = noise_audios(processor)
    if kinds == ("audio",):
        return [Shown(audios=[wave]) for wave in waves]
    sounds = cycle(waves if "audio" in kinds else [None])
    return [
        Shown(videos=[v], sound=sound) for v, sound in zip(noise_videos(), sounds, strict=False)
    ]


def _clip(
    processor: ProcessorMixin,
    view: TextView,
    special_ids: frozenset[int],
    number_ids: frozenset[int],
    kinds: tuple[Kind, ...],
    around: Sequence[tuple[str, str]],
    shown: Sequence[Shown],
) -> Clip | None:
    """The pattern that all of `shown` have between these texts; None where there is none."""
    samples = [(around[0], each) for each in shown] + [(around[1], shown[-1])]
    try:
        differences = [_difference(processor, kinds, texts, each) for texts, each in samples]
    except Exception:  # whatever a processor raises: it does not write such a request
        return None
    chunks = [chunk for chunk, _ in differences]
    insteads = {instead for _, instead in differences}
    for breaks in (frozenset[int](), special_ids):
        pads = _pads(chunks, view.placeholder_ids, breaks)
        if not pads or len(insteads) > 1:
            continue
        forms = {_collapsed(chunk, pads, number_ids) for chunk in chunks}
        first, *more = sorted(forms, key=lambda form: (len(form), form))
        head = _common(first, more[0]) if more else len(first)
        unit = more[0][head : head + len(more[0]) - len(first)] if more else ()
        (instead,) = insteads
        clip = Clip(kinds, pads, first[:head], unit, first[head:], instead)
        pattern = clip.expression(number_ids)
        if all(re.fullmatch(pattern, "".join(map(chr, chunk))) for chunk in chunks):
            return clip
    return None


def _bare(processor: ProcessorMixin, clip: Clip) -> Clip:
    """The clip without white space at its ends, for where that is fused with other neighbours'."""
    tokenizer = tokenizer_of(processor)

    def blank(token: int) -> bool:
        return not str(tokenizer.decode([token])).strip()

    head, tail = list(clip.head), list(clip.tail)
    while head and blank(head[0]):
        del head[0]
    last = tail or head
    while last and blank(last[-1]):
        del last[-1]
    return replace(clip, head=tuple(head), tail=tuple(tail), instead=())


def _difference(
    processor: ProcessorMixin, kinds: tuple[Kind, ...], texts: tuple[str, str], shown: Shown
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a conversation with a medium between two texts has more, and what without it."""
    before, after = texts
    messages = [user_message(*filter(None, (before, kinds[0], after)))]
    plain = encode_messages(processor, without_media(messages))
    ids = encode_messages(processor, messages, shown)
    prefix = _common(plain, ids)
    room = min(len(plain), len(ids)) - prefix
    suffix = _common(plain[::-1][:room], ids[::-1][:room])
    return tuple(ids[prefix : len(ids) - suffix]), tuple(plain[prefix : len(plain) - suffix])


def _pads(
    chunks: Sequence[Sequence[int]], placeholders: frozenset[int], breaks: frozenset[int]
) -> frozenset[int]:
    """The placeholders in `chunks`, and those of `breaks` that stand between two of them."""
    pads = placeholders.intersection(token for chunk in chunks for token in chunk)
    between: set[int] = set()
    for chunk in chunks:
        places = [place for place, token in enumerate(chunk) if token in placeholders]
        for left, right in pairwise(places):
            gap = set(chunk[left + 1 : right])
            between |= gap if gap <= breaks else set()
    return pads | between


def _collapsed(
    tokens: Sequence[int], pads: frozenset[int], numbers: frozenset[int]
) -> tuple[int, ...]:
    """`tokens` with one for every run of placeholders, and one for every number."""
    form: list[int] = []
    for token in tokens:
        one = min(pads) if token in pads else min(numbers) if token in numbers else token
        if not (form and form[-1] == one and (token in pads or token in numbers)):
            form.append(one)
    return tuple(form)


def _holds(
    processor: ProcessorMixin, view: TextView, kinds: tuple[Kind, ...], shown: Sequence[Shown]
) -> bool:
    """Whether the view is the template's own text, also where media stand together.

    There, white space may differ, if the tokenizer fuses that of a medium with its neighbour's.
    """
    tokenizer = tokenizer_of(processor)
    fused = any(clip.instead for clip in view.clips)
    kind, image = kinds[0], noise_image(0).resize((96, 64))
    ask, more = "What is shown here?", "And now?"
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Bread."}]}
    one, other = shown[0], shown[-1]
    cases: list[tuple[list[dict[str, Any]], Shown]] = [
        ([user_message(kind, ask)], other),
        ([user_message(kind, ask), reply, user_message(more)], one),
        ([user_message(ask), reply, user_message(kind, more)], one),
        ([user_message("image", kind, ask)], replace(one, images=[image])),
        ([user_message(kind, "image", ask)], replace(other, images=[image])),
    ]
    if one.sound is None:
        both = Shown(videos=[*one.videos, *other.videos], audios=[*one.audios, *other.audios])
        cases.append(([user_message(kind, kind, ask)], both))
    for place, (messages, media) in enumerate(cases):
        try:
            ids = encode_messages(processor, messages, media)
        except Exception:  # not every processor takes several turns or several media
            if place == 0:
                return False
            continue
        plain = encode_messages(processor, without_media(messages))
        try:
            text = view(ids)
        except SafeguardError:
            return False
        blanks = fused and place > 0 and letters(tokenizer, text) == letters(tokenizer, plain)
        if text != plain and not blanks:
            return False
    return True


def _refused(
    processor: ProcessorMixin,
    view: TextView,
    special_ids: frozenset[int],
    number_ids: frozenset[int],
    kinds: tuple[Kind, ...],
    shown: Sequence[Shown],
) -> list[Clip]:
    """By what a row is known to hold such a medium, where it takes an image's placeholders.

    That is a token that nothing else has; or what stands between two frames of a video.
    """
    texts = _AROUND[0][0]
    plain = user_message(texts[1])
    tokenizer = tokenizer_of(processor)
    chunks: list[Sequence[int]] = []
    try:
        rendered = render_messages(processor, [user_message(kinds[0], texts[1])])
        chunks.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        chunks += [_difference(processor, kinds, texts, each)[0] for each in shown]
    except Exception:  # the template or the processor does not write it
        pass
    known = {*encode_messages(processor, [plain]), *view.frame_ids, *view.placeholder_ids}
    own = special_ids.intersection(token for chunk in chunks for token in chunk) - known
    if own:
        return [Clip(kinds, frozenset({token}), (token,), known=False) for token in sorted(own)]
    pads = view.placeholder_ids
    for chunk in chunks[1:]:
        marks = list(view.marks(chunk))
        for (_, stop), (start, end) in pairwise(marks):
            if stop < start:
                form = _collapsed(chunk[stop:end], pads, number_ids)
                head = form[: form.index(min(pads)) + 1] if min(pads) in form else form
                return [_bare(processor, Clip(kinds, pads, head, known=False))]
    return []


def _alone(processor: ProcessorMixin, token: int) -> Clip:
    """A placeholder that no image takes, where it stands in no video or audio that is known."""
    audio = getattr(processor, "audio_token_id", None)
    return Clip(
        ("audio" if token == audio else "video",), frozenset({token}), (token,), known=False
    )


def _in_order(clips: Sequence[Clip]) -> tuple[Clip, ...]:
    """Each once; known ones first, and of those the ones that say most."""
    different = dict.fromkeys(clips)
    return tuple(
        sorted(
            different, key=lambda clip: (not clip.known, -len(clip.head + clip.unit + clip.tail))
        )
    )


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common start of two sequences."""
    length = 0
    for mine, theirs in zip(left, right, strict=False):
        if mine != theirs:
            break
        length += 1
    return length
