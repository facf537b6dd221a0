"""A fixed refusal behind a guard's gate: what a filter in front of a model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_safeguard.defences.defence import Answer
from vlm_safeguard.defences.guard_model import REFUSAL
from vlm_safeguard.defences.guarded import Guarded
from vlm_safeguard.policy.response import Response

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.model.vlm import VLM


@dataclass(frozen=True, eq=False)
class Canned:
    """The guard's gate; what it opens for is answered with one sentence, always the same."""

    guard: Guard

    name: ClassVar[str] = "canned"

    @classmethod
    def of(cls, guard: Guard) -> Canned:
        """With this guard's gate."""
        return cls(guard.variant(response=Response.TEXT))

    def generate(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        """See `Defence.generate`."""
        return [
            replace(answer, text=REFUSAL, tokens=0)
            if answer.receipt is not None and answer.receipt.guarded
            else answer
            for answer in Guarded(self.guard).generate(vlm, chats, **options)
        ]
