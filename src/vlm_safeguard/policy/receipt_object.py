"""The receipt as a client sees it: an object in the answer, and a short header."""

from __future__ import annotations

from typing import Any

from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt

HEADER = "x-guard"


def receipt_object(receipt: Receipt, policy: Policy) -> dict[str, Any]:
    """What was decided and done, and what was not looked at.

    Args:
        policy: that decided.
    """
    return {
        "open": receipt.guarded,
        "by": opened_by(receipt),
        "reason": receipt.reason,
        "response": None if receipt.response is None else str(receipt.response),
        "scores": {name: round(value, 4) for name, value in receipt.scores.items()},
        "images": receipt.images,
        "not_judged": not_judged(receipt, policy),
        "not_used": receipt.not_used,
        "policy": receipt.policy,
    }


def header(receipt: Receipt) -> str:
    """`open; by=own_refusal; response=edit; policy=0123456789ab`, or `closed; policy=…`."""
    how = f"by={opened_by(receipt)}; response={receipt.response}; " if receipt.guarded else ""
    return f"{decision(receipt)}; {how}policy={receipt.policy[:12]}"


def decision(receipt: Receipt) -> str:
    """`open`, `closed`, or `not_asked` of a request without an image."""
    if receipt.guarded:
        return "open"
    return "closed" if receipt.findings else "not_asked"


def opened_by(receipt: Receipt) -> str | None:
    """The first criterion that opened the gate."""
    return next((finding.criterion for finding in receipt.findings if finding.opened), None)


def not_judged(receipt: Receipt, policy: Policy) -> list[str]:
    """What of a request no criterion of the gate looked at."""
    if not receipt.findings:
        return ["text"]  # there is no image, so the answer is the language model's own
    media = {"images": receipt.images, "videos": receipt.videos, "audios": receipt.audios}
    looks = any(criterion.reads == "image" for criterion in policy.gate)
    return [] if looks else [name for name, count in media.items() if count]
