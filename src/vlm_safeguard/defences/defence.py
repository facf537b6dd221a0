"""The one door that everything compared goes through: conversations in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import chat_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.policy.receipt import Receipt


@dataclass(frozen=True)
class Answer:
    """What one request was answered with.

    Attributes:
        text: of the answer, without special tokens.
        tokens: of the answer, up to and with the one that ends it; 0 where none was generated.
        receipt: what the guard did, where one was attached.
    """

    text: str
    tokens: int
    receipt: Receipt | None = None


class Defence(Protocol):
    """A way of answering one batch of conversations with a model."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def generate(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        chats: Sequence[Chat],
        **options: Any,
    ) -> list[Answer]:
        """One answer for each conversation, which ends with what the user asks.

        Args:
            model: a vision-language model in eval mode, to which no guard is attached.
            options: of the model's `generate`, for the answers: `max_new_tokens` and the like;
                greedy unless they say otherwise.

        Raises:
            SafeguardError: the model, the processor or the conversations cannot be used.
        """


def answers(
    model: PreTrainedModel, processor: ProcessorMixin, chats: Sequence[Chat], **options: Any
) -> list[Answer]:
    """Answers to one batch of conversations, whatever is attached to the model."""
    inputs = chat_inputs(model, processor, chats)
    output = model.generate(**inputs, **{"do_sample": False, **options})
    if len(output) != len(chats):
        raise SafeguardError(
            f"generate gave {len(output)} answers to {len(chats)} requests; a defence gives one "
            "each. Leave num_return_sequences out."
        )
    rows = [until_end(model, row, **options) for row in output[:, inputs["input_ids"].shape[1] :]]
    return [Answer(processor.decode(row, skip_special_tokens=True), len(row)) for row in rows]


def until_end(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """`tokens` up to and with the first that ends an answer; what follows is padding.

    Args:
        tokens: (new tokens,) of one answer.
        options: what `generate` was given.
    """
    config = options.get("generation_config") or model.generation_config
    ends = options.get("eos_token_id", config.eos_token_id)
    if ends is None:
        return tokens
    found = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens
