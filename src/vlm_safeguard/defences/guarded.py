"""A guard as a defence: attached for each batch, its receipts beside the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlm_safeguard.defences.defence import Answer, generate_answers
from vlm_safeguard.engines.hooks.text_passes import TextReadings

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.model.vlm import VLM


@dataclass(frozen=True, eq=False)
class Guarded:
    """A guard, attached for each batch.

    Attributes:
        readings: text-only passes that it takes and adds to; None to make its own each time.
    """

    guard: Guard
    name: str = "guard"
    readings: TextReadings | None = None

    @contextmanager
    def applied(self, vlm: VLM, chats: Sequence[Chat]) -> Iterator[Sequence[Chat]]:
        """See `InPasses.applied`. Their texts are read once, whatever images are shown with them.

        Raises:
            SafeguardError: in a pass, where the guard answers open requests without their images.
        """
        readings = TextReadings() if self.readings is None else self.readings
        with self.guard.attach(vlm.model, readings=readings):
            yield chats

    def generate(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        """See `Defence.generate`. Each answer carries its receipt."""
        with self.guard.attach(vlm.model, readings=self.readings) as attachment:
            answers = generate_answers(vlm, chats, **options)
        receipts = attachment.receipts
        beams = len(receipts) // len(answers)  # each beam of a request has a receipt, all the same
        return [
            replace(answer, receipt=receipt)
            for answer, receipt in zip(answers, receipts[::beams], strict=True)
        ]


def sharing_readings(guards: Mapping[str, Guard]) -> dict[str, Guarded]:
    """Guards of one model for one batch, by name: its text-only pass is made once for them all."""
    readings = TextReadings()
    return {name: Guarded(guard, name, readings) for name, guard in guards.items()}
