"""What is attacked: a model with a defence at work, as a function of its images' pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Self

import torch

from vlm_safeguard.defences.canned import Canned
from vlm_safeguard.defences.defence import Defence, InPasses
from vlm_safeguard.defences.guarded import Guarded
from vlm_safeguard.defences.prompts import NONE, PromptDefence
from vlm_safeguard.defences.table import defences
from vlm_safeguard.model.conversation import unseen
from vlm_safeguard.policy.refusal import first_token_margin

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.attacks.pixels import Pixels
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.model.vlm import VLM
    from vlm_safeguard.policy.policy import Policy

_AFFIRMATIVE = "Sure"  # what an answer opens with that gives what was asked


@dataclass(frozen=True, eq=False)
class Target:
    """A model and what stands between an attacker and its answers.

    Attributes:
        defence: through which gradients flow: the defence itself, or none where it has no pass of
            its own that answers beside the image. Attacks on those are transferred.
        refusals: first tokens of the model's refusals; none where they are not known.
        gate: whose gate reads the text before the model does; None where none does.
    """

    vlm: VLM
    defence: InPasses
    refusals: tuple[int, ...]
    gate: Policy | None = None

    @classmethod
    def of(cls, vlm: VLM, guard: Guard, name: str) -> Self:
        """A model under a defence of the table.

        Args:
            guard: fitted on the model; it knows how the model refuses.

        Raises:
            SafeguardError: there is no such defence.
        """
        defence = defences(guard, [name])[name]
        return cls(vlm, _differentiable(defence), guard.policy.refusal_tokens, _gate(defence))

    @property
    def name(self) -> str:
        """The defence that attacks are made through."""
        return self.defence.name

    @property
    def reader(self) -> str:
        """What reads the text: the guard's gate, a defence with words of its own, or "none"."""
        if self.gate is not None:
            return "gate"
        return self.defence.name if isinstance(self.defence, PromptDefence) else NONE.name

    @contextmanager
    def passes(self, chats: Sequence[Chat], pixels: Pixels) -> Iterator[Passes]:
        """While open, the defended model's passes over conversations with one image each.

        Raises:
            SafeguardError: the model or the conversations cannot be used.
        """
        with frozen(self.vlm.model), self.defence.applied(self.vlm, chats) as defended:
            yield Passes(self.vlm, dict(self.vlm.encode(defended)), pixels)

    def texts(self, chats: Sequence[Chat]) -> list[Chat]:
        """Conversations as the language model reads them without their images."""
        if isinstance(self.defence, PromptDefence):
            with self.defence.applied(self.vlm, chats) as defended:
                chats = list(defended)
        return [unseen(chat) for chat in chats]

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows,) what an attack lowers, in logits or nats.

        By how much a refusal's first token leads all others; or, where those are not known, −log of
        the probability that the answer begins with "Sure".

        Args:
            logits: (rows, vocabulary) of the answer's first token.
        """
        if self.refusals:
            return first_token_margin(logits, self.refusals)
        token = self.vlm.tokenizer(_AFFIRMATIVE, add_special_tokens=False)["input_ids"][0]
        return -logits.log_softmax(-1)[:, token]


@dataclass(frozen=True, eq=False)
class Passes:
    """Differentiable passes over one batch of conversations.

    Attributes:
        inputs: the batch as the processor encoded it.
    """

    vlm: VLM
    inputs: dict[str, Any]
    pixels: Pixels

    def logits(self, levels: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits of the answers' first tokens.

        Args:
            levels: (rows, count) of the images, in the order of the conversations.
        """
        model = self.vlm.model
        keep = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
        values = self.pixels(levels).to(self.inputs["pixel_values"])
        output = model(**{**self.inputs, "pixel_values": values}, use_cache=False, **keep)
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _differentiable(defence: Defence) -> InPasses:
    """A defence through which gradients flow to the image; none for one that has no such pass."""
    if isinstance(defence, Guarded) and not defence.guard.policy.edits:
        return NONE  # an open request's answer is no function of the image
    if isinstance(defence, PromptDefence) and defence.marker:
        return NONE  # it begins with thoughts, so its first token is not the answer's
    return defence if isinstance(defence, InPasses) else NONE


def _gate(defence: Defence) -> Policy | None:
    """The policy whose gate a defence asks about the text; None where there is none."""
    if not isinstance(defence, Guarded | Canned):
        return None
    policy = defence.guard.policy
    return policy if policy.asks_for_harm else None


def _parameters(model: Any) -> Any:
    return signature(model.forward).parameters


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """While open, no gradients are taken to the weights."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
