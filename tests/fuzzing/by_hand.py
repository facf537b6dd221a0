"""The reference: plain hooks that edit, token by token, what a guard of this policy has to.

It takes from the guard what the receipts say was opened, and nothing else: where requests end,
what their text is and which tokens an edit spans is found out anew from the prompts' ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuzzing.cases import ANSWER
from support.reference import Change, counterparts, edit_by_hand, plain_hooks, text_reading
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.cache import cache_in
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.span import Span


@dataclass(frozen=True)
class Row:
    """One prompt's edits: what they do, `pads` to its left, and the positions that they span."""

    change: Change
    pads: int
    spanned: frozenset[int]


def row_by_hand(
    model: PreTrainedModel,
    guard: Guard,
    ids: Sequence[int],
    keep: Sequence[bool],
    text: Sequence[int] | None = None,
) -> Row:
    """From one padded prompt.

    Args:
        text: its request's tokens without media; where it is not given, what is no image token.
    """
    prompt = [token for token, kept in zip(ids, keep, strict=True) if kept]
    asked = answer_start(prompt) if text is None else len(prompt)
    if text is None:
        images = guard.policy.text_view.placeholder_ids
        text = [token for token in prompt[:asked] if token not in images]
    spanned = counterparts(guard, prompt[:asked], text)
    places = spanned | {place: len(text) - 1 for place in range(asked, len(prompt))}
    change = edit_by_hand(guard, text_reading(model, text), places, asked - 1)
    return Row(change, len(ids) - len(prompt), frozenset(places))


def answer_start(prompt: list[int]) -> int:
    """Where the last generation prompt ends; the prompt's own end where it holds none."""
    for end in range(len(prompt), len(ANSWER) - 1, -1):
        if prompt[end - len(ANSWER) : end] == ANSWER:
            return end
    return len(prompt)


@contextmanager
def edited(
    model: PreTrainedModel,
    guard: Guard,
    rows: Sequence[Row],
    prompt: int,
    receipts: Sequence[Receipt],
) -> Iterator[None]:
    """Plain hooks, for one `generate` of any kind: positions are counted by the cache.

    Args:
        prompt: tokens in each padded row.
        receipts: one for each row that is run, which may be several of each prompt.
    """
    start, copies = 0, 1

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal start, copies
        past = cache_in(kwargs)
        start = 0 if past is None else int(past.get_seq_length())
        copies = len(kwargs["input_ids"]) // len(rows)

    def edit(layer: int, number: int, place: int, state: Tensor) -> Tensor:
        row = rows[number // copies]
        receipt = receipts[number * len(receipts) // (len(rows) * copies)]
        position = start + place
        if layer not in receipt.layers:
            return state
        if position < prompt:
            acts = position - row.pads in row.spanned
        else:
            acts = guard.policy.edit.span is Span.ANSWER
        return row.change(layer, position - row.pads, state) if acts else state

    with plain_hooks(model, look, edit):
        yield
