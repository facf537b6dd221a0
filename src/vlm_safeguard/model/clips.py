"""What a video and an audio become in a prompt, learnt from the model's processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from vlm_safeguard.policy.token_ids import same_start

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from vlm_safeguard.policy.text_view import TextView

Kinds = tuple[Kind, ...]
Tokens = tuple[int, ...]

#: A processor that has this reads a video's sound with it.
_WITH_SOUND = "replace_video_with_audio_token"
_ASK, _MORE = "What is shown here?", "Describe it in one word."
#: Two texts before and behind a clip: at the start of its turn, between texts, and at the end.
_AROUND = (
    (("", _ASK), ("", _MORE)),
    (("Look at this.\n", _ASK), ("Here:\n", _MORE)),
    ((_ASK, ""), (_MORE, "")),
)


def learn_clips(
    processor: ProcessorMixin,
    view: TextView,
    special_ids: frozenset[int],
) -> TextView:
    """`view` with what videos and audio become, as this processor writes them.

    A kind that it cannot show, or whose form fits no pattern, is refused: by its placeholder, or
    where it takes an image's, by what else stands there.

    Args:
        view: of images; its `number_ids` are the tokens that write digits.
        special_ids: tokens that stand for more than their text.
    """
    learner = _Learner(processor, view, special_ids)
    heard: tuple[Kinds, ...] = (("video", "audio"),) if hasattr(processor, _WITH_SOUND) else ()
    clips: list[Clip] = []
    for kinds in (("video",), *heard, ("audio",)):
        shown = learner.shown(kinds)
        learnt = learner.clips(kinds, shown)
        tried = replace(view, clips=_in_order([*clips, *learnt]))
        if learnt and learner.holds(tried, kinds, shown):
            clips += learnt
        else:
            clips += learner.refused(kinds, shown)
    alone = sorted(view.placeholder_ids - (view.image_ids or frozenset()))
    return replace(view, clips=_in_order([*clips, *map(learner.alone, alone)]))


@dataclass(frozen=True)
class _Learner:
    """Asks a processor questions with and without media; its fields are `learn_clips`'."""

    processor: ProcessorMixin
    view: TextView
    special_ids: frozenset[int]

    def shown(self, kinds: Kinds) -> list[Shown]:
        """Media of these kinds in several sizes, one each: those that the processor takes."""
        waves = noise_audios(self.processor)
        sounds = cycle(waves if "audio" in kinds else [None])
        every = (
            [Shown(audios=[wave]) for wave in waves]
            if kinds == ("audio",)
            else [
                Shown(videos=[video], sound=sound)
                for video, sound in zip(noise_videos(), sounds, strict=False)
            ]
        )
        taken = []
        for each in every:
            with suppress(Exception):  # some take no audio, or no video of one frame
                self.difference(kinds, ("", _ASK), each)
                taken.append(each)
        return taken

    def clips(self, kinds: Kinds, shown: Sequence[Shown]) -> list[Clip]:
        """What one becomes at the start of its turn, between texts and at the end."""
        if len(shown) < 2:
            return []
        learnt = [clip for texts in _AROUND if (clip := self.clip(kinds, texts, shown)) is not None]
        return learnt + [_bare(self.processor, clip) for clip in learnt if clip.instead]

    def clip(
        self, kinds: Kinds, around: Sequence[tuple[str, str]], shown: Sequence[Shown]
    ) -> Clip | None:
        """The pattern that all of `shown` have between these texts; None where there is none."""
        samples = [(around[0], each) for each in shown] + [(around[1], shown[-1])]
        try:
            differences = [self.difference(kinds, texts, each) for texts, each in samples]
        except Exception:  # whatever a template or processor raises: it writes no such request
            return None
        chunks = [chunk for chunk, _ in differences]
        insteads = {instead for _, instead in differences}
        for breaks in (frozenset[int](), self.special_ids):
            pads = _pads(chunks, self.view.placeholder_ids, breaks)
            if not pads or len(insteads) > 1:
                continue
            forms = {_collapsed(chunk, pads, self.view.number_ids) for chunk in chunks}
            first, *more = sorted(forms, key=lambda form: (len(form), form))
            head = same_start(first, more[0]) if more else len(first)
            unit = more[0][head : head + len(more[0]) - len(first)] if more else ()
            (instead,) = insteads
            clip = Clip(kinds, pads, first[:head], unit, first[head:], instead)
            pattern = clip.expression(self.view.number_ids)
            if all(re.fullmatch(pattern, "".join(map(chr, chunk))) for chunk in chunks):
                return clip
        return None

    def difference(self, kinds: Kinds, texts: tuple[str, str], shown: Shown) -> tuple[Tokens, ...]:
        """What a conversation with a medium between two texts has more, and what without it."""
        before, after = texts
        messages = [user_message(*filter(None, (before, kinds[0], after)))]
        plain = encode_messages(self.processor, without_media(messages))
        ids = encode_messages(self.processor, messages, shown)
        prefix = same_start(plain, ids)
        room = min(len(plain), len(ids)) - prefix
        suffix = same_start(plain[::-1][:room], ids[::-1][:room])
        return tuple(ids[prefix : len(ids) - suffix]), tuple(plain[prefix : len(plain) - suffix])

    def holds(self, view: TextView, kinds: Kinds, shown: Sequence[Shown]) -> bool:
        """Whether the view is the template's own text, also where media stand together.

        There, white space may differ, if the tokenizer fuses that of a medium with its neighbour's.
        """
        processor, tokenizer = self.processor, tokenizer_of(self.processor)
        fused = any(clip.instead for clip in view.clips)
        for place, (messages, media) in enumerate(_together(kinds, shown[0], shown[-1])):
            try:
                ids = encode_messages(processor, messages, media)
            except Exception:  # not every processor takes several turns or several media
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

    def refused(self, kinds: Kinds, shown: Sequence[Shown]) -> list[Clip]:
        """By what a row is known to hold such a medium, where it takes an image's placeholders.

        That is a token that nothing else has; or what stands between two frames of a video.
        """
        tokenizer, pads = tokenizer_of(self.processor), self.view.placeholder_ids
        rendered: Sequence[int] = ()
        chunks = [self.difference(kinds, ("", _ASK), each)[0] for each in shown]
        with suppress(Exception):  # the template does not write it
            text = render_messages(self.processor, [user_message(kinds[0], _ASK)])
            rendered = tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = encode_messages(self.processor, [user_message(_ASK)])
        written = {*rendered, *(token for chunk in chunks for token in chunk)}
        own = (self.special_ids & written).difference(plain, self.view.frame_ids, pads)
        if own:
            return [Clip(kinds, frozenset({token}), (token,), known=False) for token in sorted(own)]
        for chunk in chunks:
            for (_, stop), (start, end) in pairwise(self.view.marks(chunk)):
                form = _collapsed(chunk[stop:end], pads, self.view.number_ids)
                if stop < start and min(pads) in form:
                    head = form[: form.index(min(pads)) + 1]
                    return [_bare(self.processor, Clip(kinds, pads, head, known=False))]
        return []

    def alone(self, token: int) -> Clip:
        """A placeholder that no image takes, where it stands in no known video or audio."""
        hears = token == getattr(self.processor, "audio_token_id", None)
        kind: Kind = "audio" if hears else "video"
        return Clip((kind,), frozenset({token}), (token,), known=False)


def _together(kinds: Kinds, one: Shown, other: Shown) -> list[tuple[list[dict[str, Any]], Shown]]:
    """Conversations in which media stand in other turns, beside an image or beside each other."""
    kind, image = kinds[0], noise_image(0).resize((96, 64))
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Bread."}]}
    cases = [
        ([user_message(kind, _ASK)], other),
        ([user_message(kind, _ASK), reply, user_message(_MORE)], one),
        ([user_message(_ASK), reply, user_message(kind, _MORE)], one),
        ([user_message("image", kind, _ASK)], replace(one, images=[image])),
        ([user_message(kind, "image", _ASK)], replace(other, images=[image])),
    ]
    if one.sound is None:
        both = Shown(videos=[*one.videos, *other.videos], audios=[*one.audios, *other.audios])
        cases.append(([user_message(kind, kind, _ASK)], both))
    return cases


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


def _pads(
    chunks: Sequence[Tokens], placeholders: frozenset[int], breaks: frozenset[int]
) -> frozenset[int]:
    """The placeholders in `chunks`, and those of `breaks` that stand between two of them."""
    between: set[int] = set()
    for chunk in chunks:
        places = [place for place, token in enumerate(chunk) if token in placeholders]
        for left, right in pairwise(places):
            gap = set(chunk[left + 1 : right])
            between |= gap if gap <= breaks else set()
    return placeholders.intersection(token for chunk in chunks for token in chunk) | between


def _collapsed(tokens: Tokens, pads: frozenset[int], numbers: frozenset[int]) -> Tokens:
    """`tokens` with one for every run of placeholders, and one for every number."""
    form: list[int] = []
    for token in tokens:
        one = min(pads) if token in pads else min(numbers) if token in numbers else token
        if not (form and form[-1] == one and (token in pads or token in numbers)):
            form.append(one)
    return tuple(form)


def _in_order(clips: Sequence[Clip]) -> tuple[Clip, ...]:
    """Each once; known ones first, and of those the ones that say most."""

    def rank(clip: Clip) -> tuple[bool, int]:
        return not clip.known, -len(clip.head + clip.unit + clip.tail)

    return tuple(sorted(dict.fromkeys(clips), key=rank))
