"""Defences that only add words to the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_safeguard.conversation import Chat, asked, rephrased
from vlm_safeguard.defences.defence import Answer, answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class PromptDefence:
    """Words around the last request, in the user's turn, so that any chat template takes them.

    Without words, the conversation stays as it is.
    """

    name: str
    before: str = ""
    after: str = ""

    def prompt(self, request: str) -> str:
        """The request, verbatim, between the added words."""
        return "\n\n".join(filter(None, (self.before, request, self.after)))

    def generate(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        chats: Sequence[Chat],
        **options: Any,
    ) -> list[Answer]:
        """See `Defence.generate`."""
        if self.before or self.after:
            chats = [rephrased(chat, self.prompt(asked(chat))) for chat in chats]
        return answers(model, processor, chats, **options)


#: The model as it is.
NONE = PromptDefence("none")


#: A reminder of responsibility before and after the request (Xie et al., Nature Machine
#: Intelligence 2023). The wording is ours.
SELF_REMINDER = PromptDefence(
    "self-reminder",
    before=(
        "You are an assistant who answers for what its words may cause. Help where you can, and "
        "never write anything dangerous, illegal or deceptive. Here is the request:"
    ),
    after="Keep in mind that you are responsible for your answer, and that it must harm nobody.",
)

#: A fixed prompt that has the image examined before the text (AdaShield-S, arXiv 2403.09513).
#: The wording is ours.
ADASHIELD = PromptDefence(
    "adashield-s",
    after=(
        "Before you answer, look at the image part by part: does it show, or spell out in "
        "letters, anything harmful, illegal or dangerous? Then read the request together with "
        "what you saw: would doing what it asks cause harm? If either is so, say only that you "
        "are sorry and cannot help. If neither is, answer the request as usual."
    ),
)
