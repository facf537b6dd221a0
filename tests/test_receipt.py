"""What a receipt says in words."""

from __future__ import annotations

import pytest

from vlm_safeguard.policy.media import Media
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.request import Request
from vlm_safeguard.policy.response import Response

pytestmark = pytest.mark.versions


def receipt(media: Media, begun: int = 0, response: Response | None = Response.TEXT) -> Receipt:
    """Of a request that shows this, whose answer has begun with so many tokens."""
    request = Request((7,), ((0, 0),), 0, (9,) * begun, None, media)
    return Receipt.of(request, (), response=response, layers=(), edit="x", harm=None, policy="0")


@pytest.mark.parametrize(
    ("media", "words"),
    [
        (Media(images=1), "1 image"),
        (Media(images=2, audios=1), "2 images, 1 audio"),
        (Media(images=1, videos=3, audios=2), "1 image, 3 videos, 2 audios"),
    ],
)
def test_media_are_counted_in_words(media: Media, words: str) -> None:
    assert receipt(media).media == words
    assert receipt(media).not_used == words
    assert receipt(media, response=Response.EDIT).not_used is None
    assert receipt(media, response=None).not_used is None


def test_a_request_that_shows_nothing_has_no_words_for_it() -> None:
    assert receipt(Media()).media == ""


@pytest.mark.parametrize(
    ("begun", "words"),
    [(1, "2 images, 1 token of a begun answer"), (3, "2 images, 3 tokens of a begun answer")],
)
def test_a_begun_answer_that_is_not_gone_on_with_is_named(begun: int, words: str) -> None:
    assert receipt(Media(images=2), begun).not_used == words
