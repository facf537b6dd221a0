"""How far a guard moves what a model says on requests it should leave alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import isnan
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import BaseModel, ConfigDict

from vlm_safeguard.defences.defence import until_end
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.statistics import Estimate, ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlm_safeguard.model.conversation import Chat
    from vlm_safeguard.model.vlm import VLM


class Divergence(BaseModel):
    """KL along answers: its sum in nats, and the tokens, of each."""

    model_config = ConfigDict(frozen=True)

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[torch.Tensor]) -> Self:
        """Of (tokens,) values each, as `divergences` gives them."""
        return cls(sums=tuple(float(each.sum()) for each in values), tokens=tuple(map(len, values)))

    def mean(self) -> Estimate:
        """Nats a token, with the interval of a bootstrap over answers."""
        return ratio(self.sums, self.tokens)


@torch.inference_mode()
def divergences(
    vlm: VLM,
    chats: Sequence[Chat],
    attach: Callable[[PreTrainedModel], AbstractContextManager[Any]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """KL(unguarded ‖ guarded) at every token of the model's own, unguarded greedy answer.

        KL_t = Σ_v p_t(v) · (log p_t(v) − log q_t(v))

    with p_t and q_t the distributions of the t-th token without and with the guard, both behind
    the same request and the same earlier tokens. The guarded model is made to write the unguarded
    answer by `generate` itself, as a guard locates a request by what `generate` is given; both
    runs are of the same shape, so a row that is not edited gives exactly 0.

    Args:
        attach: puts the guard on the model: `guard.attach`.
        batch_size: requests at a time; (rows, tokens, vocabulary) logits are held twice.

    Returns:
        (tokens,) float64 each, in nats, up to and with the token that ends the answer.

    Raises:
        SafeguardError: a distribution is not one (logits that are not numbers).
    """
    model, values = vlm.model, []
    for start in range(0, len(chats), batch_size):
        inputs = vlm.encode(chats[start : start + batch_size])
        plain, logits = _generate(model, inputs, max_new_tokens)
        answers = plain[:, inputs["input_ids"].shape[1] :]

        def next_of(row: int, before: torch.Tensor, plain: torch.Tensor = plain) -> list[int]:
            """The token that follows in the unguarded answer, and no other."""
            return [int(plain[row, len(before)])]

        with attach(model):
            written, guarded = _generate(model, inputs, answers.shape[1], next_of)
        for row, answer in enumerate(answers):
            steps = range(len(until_end(model, answer)))
            kl = [_kl(logits[step][row], guarded[step][row]) for step in steps]
            values.append(torch.tensor(kl, dtype=torch.float64))
        # last, as logits that are not numbers spoil what is written, and are the better reason
        if not torch.equal(written, plain):
            raise SafeguardError(
                "The guarded model could not be made to write the unguarded answer, so the two "
                "cannot be compared."
            )
    return values


def _generate(
    model: PreTrainedModel,
    inputs: Any,
    max_new_tokens: int,
    allowed: Callable[[int, torch.Tensor], list[int]] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Greedy tokens, prompt and all, and the (rows, vocabulary) logits of each new one, as made.

    Args:
        allowed: of a row, by its number in the batch and its tokens, what may come next.
    """
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, output.logits


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL divergence in nats of two (vocabulary,) logits; where p is 0 nothing is added."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    value = float(terms.sum())
    if isnan(value):
        raise SafeguardError("The model gave logits that are not numbers; no divergence is known.")
    return max(value, 0.0)  # rounding can take it below
