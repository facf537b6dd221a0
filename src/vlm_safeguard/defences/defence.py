"""What every defence is: conversations in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.model.vlm import VLM, LanguageModel
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

    def generate(self, vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
        """One answer for each conversation, which ends with what the user asks.

        Args:
            vlm: in eval mode, with no guard attached.
            options: of the model's `generate`, for the answers: `max_new_tokens` and the like;
                greedy unless they say otherwise.

        Raises:
            SafeguardError: the model or the conversations cannot be used.
        """


@runtime_checkable
class InPasses(Protocol):
    """A defence that acts in the model's own passes alone, so that gradients flow through it."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def applied(self, vlm: VLM, chats: Sequence[Chat]) -> AbstractContextManager[Sequence[Chat]]:
        """While open, the model's passes over the conversations that it gives are defended.

        Args:
            vlm: in eval mode, with no guard attached.

        Raises:
            SafeguardError: the model or the conversations cannot be used.
        """


def generate_answers(vlm: VLM, chats: Sequence[Chat], **options: Any) -> list[Answer]:
    """Answers to one batch of conversations, whatever is attached to the model.

    Args:
        options: of the model's `generate`; greedy unless they say otherwise.

    Raises:
        SafeguardError: the conversations cannot be encoded, or get several answers each.
    """
    inputs = vlm.encode(chats)
    output = vlm.model.generate(**inputs, **{"do_sample": False, **options})
    if len(output) != len(chats):
        raise SafeguardError(
            f"generate gave {len(output)} answers to {len(chats)} requests; a defence gives one "
            "each. Leave num_return_sequences out."
        )
    rows = output[:, inputs["input_ids"].shape[1] :]
    return decoded(vlm, rows, **options)


def decoded(answerer: VLM | LanguageModel, rows: torch.Tensor, **options: Any) -> list[Answer]:
    """Generated tokens as answers, each up to its end.

    Args:
        rows: (rows, new tokens).
        options: what `generate` was given.
    """
    answers = [until_end(answerer.model, row, **options) for row in rows]
    decode = answerer.processor.decode
    return [Answer(decode(row, skip_special_tokens=True), len(row)) for row in answers]


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
    ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).nonzero()
    return tokens[: int(ended[0]) + 1] if len(ended) else tokens
