"""One request, answered by one model twice: as it is, then under its guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from transformers import StoppingCriteriaList

from vlm_safeguard.engines.hooks.own_functions import ByPrompt
from vlm_safeguard.playground.bars import bars
from vlm_safeguard.playground.events import Answer, Compared, Decided, Event, Over, Read
from vlm_safeguard.playground.tokens import pieces
from vlm_safeguard.playground.words import words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vlm_safeguard.engines.hooks.attachment import Attachment
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.model.vlm import VLM

Tell = Callable[[Event], None]


def compare(vlm: VLM, guard: Guard, chat: Chat, max_new_tokens: int, tell: Tell) -> None:
    """Answer a request greedily without the guard, then with it attached.

    The guard is attached, and so verified, for the second answer alone. What the guarded pane is
    told comes from that run, and begins with the gate's decision.

    Args:
        tell: is given events, in order; what it raises ends the work.

    Raises:
        SafeguardError: the request cannot be read, or not be guarded.
    """
    inputs = vlm.encode([chat])
    row = inputs["input_ids"][0].tolist()
    options = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}
    tell(Read(pieces(row, guard.policy.text_view, vlm.tokenizer.decode)))

    shown = _Shown("unguarded", vlm.tokenizer, len(row), tell)
    unguarded = vlm.model.generate(**options, stopping_criteria=StoppingCriteriaList([shown]))
    tell(Over())

    with guard.attach(vlm.model) as attachment:
        told = _Guarded(vlm.tokenizer, len(row), tell, attachment, guard)
        output = attachment.generate(**options, stopping_criteria=StoppingCriteriaList([told]))
    tell(Compared(torch.equal(unguarded, output.output)))


class _Shown(ByPrompt):
    """Tells the answer after every token."""

    def __init__(
        self,
        pane: Literal["unguarded", "guarded"],
        tokenizer: PreTrainedTokenizerBase,
        width: int,
        tell: Tell,
    ) -> None:
        """Of a prompt of `width` tokens."""
        self._pane, self._tokenizer, self._width, self._tell = pane, tokenizer, width, tell

    def ends(self, ids: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
        """See `ByPrompt`; it ends nothing."""
        text = self._tokenizer.decode(ids[0, self._width :].tolist(), skip_special_tokens=True)
        self._tell(Answer(self._pane, text.rstrip("\ufffd")))  # half of a character
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class _Guarded(_Shown):
    """Tells the decision first."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        width: int,
        tell: Tell,
        attachment: Attachment,
        guard: Guard,
    ) -> None:
        super().__init__("guarded", tokenizer, width, tell)
        self._attachment, self._policy = attachment, guard.policy
        self._decided = False

    def ends(self, ids: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
        """See `ByPrompt`.

        Raises:
            ValueError: there is not one receipt.
        """
        if not self._decided:
            (receipt,) = self._attachment.receipts
            words = words_of(receipt, self._policy)
            self._tell(Decided(words, bars(self._policy, receipt.findings), receipt.policy))
            self._decided = True
        return super().ends(ids, prompts)
