"""An answer in pieces: whole characters, nothing behind a stop, and no more than its length."""

from __future__ import annotations

import random

import pytest
from transformers import LlavaProcessor

from vlm_safeguard.serving.answers import Answer
from vlm_safeguard.serving.jobs import Event, Job, Over, Piece
from vlm_safeguard.serving.prompts import Prompt
from vlm_safeguard.serving.requests import Sampling

TEXT = "Naïve café – 日本語 🙂🙃, how to bake? Zuerst Öl. How to bake, how to"


def said(
    processor: LlavaProcessor,
    ids: list[int],
    stops: tuple[str, ...] = (),
    limit: int = 1000,
    end: int | None = None,
) -> tuple[list[str], Over]:
    """The pieces of an answer of these tokens, and its end."""
    events: list[Event] = []
    job = Job(Prompt("", (), ()), Sampling(), 1, limit, stops, events.append)
    answer = Answer(job, 0, processor.tokenizer)
    for token in ids:
        if not answer.over:
            answer.add(token, token == end)
    answer.cut()
    *pieces, over = events
    assert isinstance(over, Over)
    assert job.left == 0
    return [piece.text for piece in pieces if isinstance(piece, Piece)], over


def test_pieces_are_whole_characters_and_together_the_text(processor: LlavaProcessor) -> None:
    ids = processor.tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) > len(TEXT.split())
    pieces, over = said(processor, ids)
    assert "".join(pieces) == TEXT
    assert len(pieces) > 20
    assert not any("\ufffd" in piece for piece in pieces)
    assert over.ids == tuple(ids)


def test_any_tokens_give_the_text_that_they_have_together(processor: LlavaProcessor) -> None:
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.randrange(len(processor.tokenizer)) for _ in range(40)]
        pieces, _ = said(processor, ids)
        assert "".join(pieces) == processor.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("length", [1, 2, 5, 11])
def test_nothing_of_a_stop_or_behind_it_is_said(processor: LlavaProcessor, length: int) -> None:
    ids = processor.tokenizer.encode(TEXT, add_special_tokens=False)
    for start in range(len(TEXT) - length + 1):
        stop = TEXT[start : start + length]
        pieces, over = said(processor, ids, (stop, "never there"))
        assert "".join(pieces) == TEXT[: TEXT.index(stop)]
        assert over.reason == "stop"


def test_a_stop_that_is_begun_and_not_ended_is_said(processor: LlavaProcessor) -> None:
    ids = processor.tokenizer.encode(TEXT, add_special_tokens=False)
    pieces, over = said(processor, ids, ("how to bake at night", "how tomorrow"))
    assert "".join(pieces) == TEXT
    assert over.reason == "length"


def test_lengths_and_ends(processor: LlavaProcessor) -> None:
    ids = processor.tokenizer.encode(TEXT, add_special_tokens=False)
    _, over = said(processor, ids, limit=7)
    assert (over.reason, over.ids) == ("length", tuple(ids[:7]))
    _, over = said(processor, ids, end=ids[4])
    assert (over.reason, over.ids) == ("stop", tuple(ids[: ids.index(ids[4]) + 1]))
