"""What the gate decides on a request by its text, before anything is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt


class Judgement(NamedTuple):
    """On one request. Where its gate is open, it is answered from `text` and `beginning`.

    Attributes:
        receipt: as `generate` gives it.
        text: token ids of the request without its media, ready for the answer.
        beginning: tokens that such an answer begins with; the rest follows behind them.
    """

    receipt: Receipt
    text: tuple[int, ...]
    beginning: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, receipts: Sequence[Receipt]) -> list[Self]:
        """On each request of a batch that is decided on by its texts."""
        return [
            cls(receipt, batch.texts[number], batch.beginning(number) if receipt.guarded else ())
            for number, receipt in enumerate(receipts)
        ]


def check_text_suffices(policy: Policy) -> None:
    """Refuse a policy under which texts alone do not say what becomes of a request.

    Raises:
        SafeguardError: and why.
    """
    if policy.edits:
        reason = "it edits an open request beside its image (Response.EDIT)"
    elif not policy.text_suffices:
        reason = "its gate looks at the pass over the image, too"
    else:
        return
    raise SafeguardError(
        f"This guard does not judge requests by their texts alone: {reason}. Use generate, whose "
        "receipts say what was decided."
    )
