"""The policy as this engine can run it: one that decides by log-probabilities of the text alone."""

from __future__ import annotations

from dataclasses import replace

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.gate import RefusalWords
from vlm_safeguard.policy.policy import Policy


def runnable(policy: Policy, *, refusal_alone: bool) -> Policy:
    """The policy that decides here; its sha256 is another where its gate is.

    Behind this gate `refusal` answers as `text` does: where it is open, the model itself refuses.

    Args:
        refusal_alone: whether the model's own refusal, in its own words, may take the place of a
            gate that reads states.

    Raises:
        SafeguardError: it edits, it reads states and that is not allowed to be left out, or it does
            not know how the model refuses.
    """
    if policy.edits:
        raise SafeguardError(
            "This guard answers open requests by an edit of the model's states, which is not done "
            "inside vLLM; choose --response refusal or --response text."
        )
    if policy.generation_prompt is None:
        raise SafeguardError(
            "This guard does not say where the model's answers begin (it is of format 3). Fit it "
            "again for vLLM."
        )
    if [type(criterion) for criterion in policy.gate] == [RefusalWords]:
        return policy
    names = ", ".join(criterion.name for criterion in policy.gate)
    own = policy.own_refusal
    if own is None:
        raise SafeguardError(
            f"This guard's gate ({names}) does not ask for the model's own refusal, and that is "
            "all that can be read inside vLLM; serve this model without --engine vllm."
        )
    if not refusal_alone:
        raise SafeguardError(
            f"This guard's gate ({names}) reads the model's states, which vLLM does not show. With "
            "--refusal-alone the model's own refusal, asked by the text alone and in the words "
            "that most of its refusals have, decides alone, and on some requests otherwise."
        )
    return replace(policy, gate=(RefusalWords(tokens=own.tokens, slack=own.slack),))
