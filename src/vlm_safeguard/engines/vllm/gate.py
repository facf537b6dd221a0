"""The policy as this engine can run it."""

from __future__ import annotations

from dataclasses import replace

from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.own_refusal import RefusalWords
from vlm_safeguard.policy.policy import Policy


def runnable(policy: Policy, *, refusal_alone: bool) -> Policy:
    """The policy that decides here: the guard's own, or one that reads no states.

    Args:
        refusal_alone: whether the model's own refusal, in its own words, takes the place of a gate
            that reads states, so that no worker has to read them. The policy's sha256 is another
            then. Behind that gate `refusal` answers as `text` does: where it is open, the model
            itself refuses.

    Raises:
        SafeguardError: it edits requests without media, too; or it is to decide by the model's own
            refusal, and does not know how the model refuses.
    """
    if policy.guards_text:
        raise SafeguardError(
            f"The edit '{policy.edit.name}' acts on requests without media, too, which is not done "
            "inside vLLM; choose another edit, or --response refusal or --response text."
        )
    if policy.generation_prompt is None:
        raise SafeguardError(
            "This guard does not say where the model's answers begin (it is of format 3). Fit it "
            "again for vLLM."
        )
    if not refusal_alone:
        return policy
    if [type(criterion) for criterion in policy.gate] == [RefusalWords]:
        return policy
    own = policy.own_refusal
    if own is None:
        names = ", ".join(criterion.name for criterion in policy.gate)
        raise SafeguardError(
            f"This guard's gate ({names}) does not ask for the model's own refusal, so that cannot "
            "decide alone; leave --refusal-alone out."
        )
    return replace(policy, gate=(RefusalWords(tokens=own.tokens, slack=own.slack),))


def check_order(policy: Policy, order: Order) -> None:
    """Refuse to begin requests before it is known how they are edited.

    Raises:
        SafeguardError: they would be.
    """
    if policy.edits and order is Order.TOGETHER:
        raise SafeguardError(
            "This guard edits open requests, and what they are edited towards is read first; "
            "choose --guard-order auto or first."
        )
