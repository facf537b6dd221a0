"""One request as a guard reads it, whatever engine runs it: its text, and the tokens of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_safeguard.policy.media import Media
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.span import Span
from vlm_safeguard.policy.token_ids import same_start


@dataclass(frozen=True)
class Request:
    """Read once from a prompt's token ids.

    Attributes:
        text: token ids of the request without its media, up to where its answer begins.
        spanned: (position in the prompt, its counterpart's place in `text` and the refusal prefix
            behind it) of each prompt token that an edit may touch, in order; `last` is always among
            them. Those whose counterpart is the text's last token are edited as `last` is.
        last: position of the token whose state the decision is taken from.
        prefill: token ids of the answer that the prompt already holds.
        generation_prompt: the name of its form; None where that is not known.
        media: the images, videos and audios that were taken out.
    """

    text: tuple[int, ...]
    spanned: tuple[tuple[int, int], ...]
    last: int
    prefill: tuple[int, ...]
    generation_prompt: str | None
    media: Media


def read_request(policy: Policy, prompt: Sequence[int]) -> Request:
    """Read a prompt's token ids, without padding.

    The request ends where the generation prompt does: what follows it is of the answer, and has no
    part in the decision.

    Raises:
        ValueError: it holds no text, no generation prompt, or another turn or media behind it.
        SafeguardError: it holds a medium whose text-only view is not known.
    """
    view = policy.text_view
    kept, origins = view.aligned(prompt)
    if not kept:
        raise ValueError("it holds no text to judge")
    media = view.media(prompt)
    text, form, last, aligned = kept, None, len(prompt) - 1, len(kept) - 1
    known = policy.generation_prompt
    if known is not None and (media.total or policy.guards_text):
        place = known.place(kept)
        end = None if place is None else origins[place.stop - 1]
        if place is None or end is None:
            raise ValueError(
                "it holds no generation prompt of this model, so where its request ends cannot be "
                "known; make it with processor.apply_chat_template(…, add_generation_prompt=True)"
            )
        text, form, last = known.judged(kept), place.form, end
        aligned = place.start + same_start(kept[place.start : place.stop], known.direct)
        behind = prompt[last + 1 :]
        shown = (view.placeholder_ids | view.frame_ids).intersection(behind)
        if shown or known.holds_turn(behind):
            raise ValueError(
                "another turn, or media, follow its last generation prompt, so that would not "
                "be judged; let the prompt end where the answer begins "
                "(add_generation_prompt=True)"
            )
    first = last + 1 if policy.edit.span is Span.LAST else view.first_medium(prompt)
    spanned = {
        origin: place
        for place, origin in enumerate(origins[:aligned])
        if origin is not None and first <= origin < last
    }
    prefill = tuple(prompt[last + 1 :])
    spanned[last] = len(text) - 1
    spoken = same_start(prefill, policy.followed)
    for number in range(len(prefill)):
        spanned[last + 1 + number] = len(text) + number if number < spoken else len(text) - 1
    return Request(
        text=tuple(text),
        spanned=tuple(sorted(spanned.items())),
        last=last,
        prefill=prefill,
        generation_prompt=form,
        media=media,
    )
