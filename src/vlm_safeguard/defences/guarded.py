"""A guard as a defence: attached for each batch, its receipts beside the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlm_safeguard.defences.defence import Answer, answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.conversation import Chat


@dataclass(frozen=True, eq=False)
class Guarded:
    """A guard, attached for each batch."""

    guard: Guard
    name: str = "guard"

    def generate(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        chats: Sequence[Chat],
        **options: Any,
    ) -> list[Answer]:
        """See `Defence.generate`. Each answer carries its receipt."""
        with self.guard.attach(model):
            found = answers(model, processor, chats, **options)
        receipts = self.guard.receipts
        beams = len(receipts) // len(found)  # each beam of a request has a receipt, all the same
        return [
            replace(answer, receipt=receipt)
            for answer, receipt in zip(found, receipts[::beams], strict=True)
        ]
