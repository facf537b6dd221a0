"""The slow reference: a request's text through the whole model, then edits by plain hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.doctor.hooking import Hook, hooked
from vlm_safeguard.doctor.subject import QUESTIONS, Subject
from vlm_safeguard.model.activations import hidden_states, with_hidden_states
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.token_ids import same_start

if TYPE_CHECKING:
    from transformers import BatchFeature


def restored_by_hand(subject: Subject, policy: Policy, inputs: BatchFeature) -> torch.Tensor:
    """`logits_along` the refusal prefix, of one request whose states are restored by hand.

    Args:
        inputs: the first question's, beside an image.
    """
    row = inputs["input_ids"][0].tolist()
    alone = text_inputs(subject, policy.text_view(row))
    states = _states_along(subject, policy, alone)
    text = alone["input_ids"][0].tolist()
    pairs = _pairs_behind_the_image(row, text, subject.backbone.placeholder_ids)
    hooks = {n: _restoring(subject, policy, n, states[n], pairs) for n in policy.layers}
    with hooked(subject.backbone.layers, hooks), torch.no_grad():
        return subject.logits_along(inputs, policy.refusal_prefix)


def text_inputs(subject: Subject, text: list[int]) -> Mapping[str, Any]:
    """The first question's inputs as the processor writes them, or, where that differs, `text`."""
    own = subject.inputs(QUESTIONS[:1], images=0)
    if own["input_ids"][0].tolist() == text:
        return own
    ids = torch.tensor([text], device=subject.backbone.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _states_along(
    subject: Subject, policy: Policy, alone: Mapping[str, Any]
) -> dict[int, list[torch.Tensor]]:
    """Layer → the (tokens, hidden) float64 states of each pass along the refusal prefix."""
    streams_at = subject.backbone.streams_at
    states: dict[int, list[torch.Tensor]] = {n: [] for n in policy.layers}

    def keeping(layer: int) -> Hook:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            states[layer].append(hidden_states(output, streams_at)[0].double())

        return hook

    with hooked(subject.backbone.layers, {n: keeping(n) for n in policy.layers}):
        subject.logits_along(alone, policy.refusal_prefix)
    return states


def _restoring(
    subject: Subject,
    policy: Policy,
    layer: int,
    passes: list[torch.Tensor],
    pairs: list[tuple[int, int]],
) -> Hook:
    """Edit the state h at each pair of places to h + Vᵀ (V h_text − V h), pass by pass.

    Args:
        passes: the text's states in each pass.
        pairs: places in the prompt and in the text, of the first pass.
    """
    V = policy.basis()[layer, : policy.rank].double()
    streams_at, aims_of = subject.backbone.streams_at, iter(passes)

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        states = hidden_states(output, streams_at).clone()
        aims = next(aims_of)
        for place, counterpart in pairs if states.shape[1] > 1 else [(-1, -1)]:
            if -place > states.shape[1]:  # left out by a layer that needs no more
                continue
            state = states[0, place].double()
            U = V.to(state.device)
            edited = state + U.mT @ (U @ aims[counterpart].to(state.device) - U @ state)
            states[0, place] = edited.to(states.dtype)
        return with_hidden_states(output, states, streams_at)

    return hook


def _pairs_behind_the_image(
    row: list[int], text: list[int], placeholders: frozenset[int]
) -> list[tuple[int, int]]:
    """Places of a prompt's text behind its first image, and of the same in its text alone.

    Both are counted from the end, from -1 on; what the text does not have is skipped, and what
    stands before the image is not looked for behind it.
    """
    first = next(i for i, token in enumerate(row) if token in placeholders)
    rest = len(text) - same_start(row[:first], text)
    pairs: list[tuple[int, int]] = []
    for place in range(-1, first - len(row), -1):
        counterpart = -1 - len(pairs)
        if -counterpart <= rest and row[place] == text[counterpart]:
            pairs.append((place, counterpart))
    return pairs
