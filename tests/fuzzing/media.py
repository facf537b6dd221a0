"""Requests with images, videos and audios, in any number and order, to models of other families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fuzzing.by_hand import edited, row_by_hand
from fuzzing.cases import edits
from fuzzing.check import hooked
from fuzzing.models import family
from fuzzing.options import some
from support.media import noise_inputs
from support.observe import Watch
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.conversation import (
    render_messages,
    user_message,
    without_media,
)
from vlm_safeguard.policy.edits import Edit
from vlm_safeguard.policy.gate import GATES, TextScore

KINDS = {
    "qwen2_vl": ("image", "video"),
    "qwen3_vl": ("image", "video"),
    "llava_next_video": ("image", "video"),
    "llava_onevision": ("image", "video"),
    "qwen2_5_omni_thinker": ("image", "video", "audio"),
}
_NEAR = 1e-3  # of logits' spread: so near, float32's rounding may choose another token


@dataclass(frozen=True)
class Media:
    """A batch of requests, each a list of texts and media in order."""

    model_type: str
    requests: list[list[str]]
    edit: Edit
    layers: tuple[int, ...]
    threshold: float | None
    options: dict[str, Any]


class Answer(NamedTuple):
    sequences: Tensor
    logits: tuple[Tensor, ...]


# A space before each word, so that no token reaches over what stands between two texts.
text = st.lists(st.text("abcdeghiknorstu", min_size=1, max_size=6), min_size=1, max_size=3).map(
    lambda written: "".join(f" {word}" for word in written)
)


@st.composite
def media_cases(draw: st.DrawFn) -> Media:
    model_type = draw(some(*KINDS))
    parts = some(*KINDS[model_type]) | text
    requests = st.lists(parts, max_size=4).flatmap(
        lambda shown: text.map(lambda said: [*shown, said])
    )
    return Media(
        model_type=model_type,
        requests=draw(st.lists(requests, min_size=1, max_size=3)),
        edit=draw(edits),
        layers=draw(some((1, 2), (0,), (2, 3))),
        threshold=draw(some(None, None, -1e6, 0.0, 1e9)),
        options={
            "max_new_tokens": draw(st.integers(1, 4)),
            **draw(some({}, {}, {"use_cache": False}, {"repetition_penalty": 1.2}, {"min_p": 0.1})),
        },
    )


def check_media(case: Media) -> str:
    """Run a case.

    Returns:
        What came of it, in a few words.

    Raises:
        AssertionError: something does not hold.
    """
    model, processor, fitted = family(case.model_type)
    reads = fitted.policy.criterion(TextScore)
    assert reads is not None
    gate: Any = GATES["open"]
    if case.threshold is not None:
        gate = (reads.model_copy(update={"threshold": case.threshold}),)
    guard = fitted.variant(layers=case.layers, edit=case.edit, gate=gate, refusal_prefix=())
    conversations = [[user_message(*parts)] for parts in case.requests]
    try:
        inputs = dict(noise_inputs(processor, conversations))
    except ValueError:
        return "media, the processor refuses"  # the stand-in's, videos of different lengths
    options = {**case.options, "do_sample": False}
    state, watch = hooked(model), Watch()
    try:
        with guard.attach(model):
            ours = _answer(model, inputs, logits_processor=[watch], **options)
            receipts = guard.receipts
    except SafeguardError as error:
        assert watch.steps == 0
        return f"media, refused: {str(error)[:70]}"
    finally:
        assert hooked(model) == state
    texts = [
        processor.tokenizer(render_messages(processor, without_media(messages)))["input_ids"]
        for messages in conversations
    ]
    for parts, words, receipt in zip(case.requests, texts, receipts, strict=True):
        counts = (receipt.images, receipt.videos, receipt.audios)
        assert counts == tuple(map(parts.count, ("image", "video", "audio")))
        assert receipt.text_tokens == len(words), f"{receipt.text_tokens} tokens of {len(words)}"
    free = _answer(model, inputs, **options)
    for number, receipt in enumerate(receipts):
        assert receipt.guarded or torch.equal(ours.sequences[number], free.sequences[number])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = [
        row_by_hand(model, guard, row, keep, words)
        for row, keep, words in zip(ids.tolist(), mask.bool().tolist(), texts, strict=True)
    ]
    with edited(model, guard, rows, ids.shape[1], receipts):
        theirs = _answer(model, inputs, **options)
    for number in range(len(rows)):
        _same_row(ours, theirs, number, ids.shape[1])
    opened = sum(receipt.guarded for receipt in receipts)
    return f"media, as by hand, {'some gate open' if opened else 'closed'}"


def _same_row(ours: Answer, theirs: Answer, row: int, start: int) -> None:
    """Equal up to where two tokens are as likely, but for rounding."""
    for step, logits in enumerate(theirs.logits):
        mine, other = (int(each.sequences[row, start + step]) for each in (ours, theirs))
        if mine != other:
            gap = float(logits[row, other] - logits[row, mine])
            assert gap < _NEAR * float(logits[row].std()), f"row {row}, step {step}: off by {gap}"
            return


def _answer(model: Any, inputs: dict[str, Any], **options: Any) -> Answer:
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return Answer(out.sequences, out.logits)
