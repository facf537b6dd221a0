"""A receipt in words."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.receipt_object import decision, not_judged
from vlm_safeguard.policy.response import Response

_TITLES = {
    "closed": "The gate is closed: nothing was changed",
    "not_asked": "The gate was not asked: there is no image",
}
_OPEN_TITLES = {
    Response.EDIT: "The gate is open: the answer was edited",
    Response.TEXT: "The gate is open: the answer is from the text alone",
    Response.REFUSAL: "The gate is open: refused from the text alone",
}


@dataclass(frozen=True)
class Words:
    """What a receipt says.

    Attributes:
        decision: `open`, `closed` or `not_asked`.
        title: the decision and what followed, in a line.
        sentences: why, what was done, and what was not looked at.
    """

    decision: str
    title: str
    sentences: list[str]


def words_of(receipt: Receipt, policy: Policy) -> Words:
    """A receipt in words.

    Args:
        policy: that decided.
    """
    response = receipt.response
    title = _TITLES[decision(receipt)] if response is None else _OPEN_TITLES[response]
    sentences = [
        _sentence(receipt.reason),
        *_done(receipt),
        _read(receipt),
        *_unseen(receipt, policy),
    ]
    return Words(decision(receipt), title, sentences)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].replace(" -", " −").rstrip(".") + "."


def _done(receipt: Receipt) -> list[str]:
    """How an open request was answered."""
    if receipt.response is None:
        return []
    if receipt.response is Response.EDIT:
        return [
            f"Its states were edited beside the image, in layers {receipt.layers[0]} to "
            f"{receipt.layers[-1]} (“{receipt.edit}”){_harm(receipt)}.",
            "An image made against the edit can still move this answer; none can move an answer "
            "from the text alone.",
        ]
    first = (
        "The answer begins with the model's own words of refusal. "
        if receipt.response is Response.REFUSAL
        else ""
    )
    return [f"{first}Not used: {receipt.not_used}; so no image can move this answer."]


def _harm(receipt: Receipt) -> str:
    if receipt.harm_before is None or receipt.harm_after is None:
        return ""
    before, after = (
        f"{score:+.2f}".replace("-", "−") for score in (receipt.harm_before, receipt.harm_after)
    )
    return f"; the harm score of its last token went from {before} to {after} there"


def _read(receipt: Receipt) -> str:
    shown = f"{receipt.media} in {receipt.media_tokens} tokens, and " if receipt.media else ""
    return f"The request is {shown}{receipt.text_tokens} tokens of text."


def _unseen(receipt: Receipt, policy: Policy) -> list[str]:
    """What no criterion looked at."""
    unseen = not_judged(receipt, policy)
    if "text" in unseen:
        return ["Without an image the answer is the language model's own, refusals too."]
    if unseen:
        return [
            "No criterion of this gate looks at the image: harm that the image alone carries is "
            "not seen."
        ]
    return []
