"""Where a pass stands in its prompt, on made-up requests: no model, no hooks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.passes import Prompt, one_more_token, whole_prompt
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.edits import Refuse
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.span import Span

IMAGE = 4
IDS = torch.tensor([[1, 1, 7, IMAGE, 8, 9], [5, IMAGE, 6, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture
def policy(guard: Guard) -> Policy:
    return replace(
        guard.policy, gate=GATES["open"], generation_prompt=None, refusal_prefix=(20, 21)
    )


def reader(policy: Policy, calls: list[Tensor] | None = None) -> Any:
    def read(ids: Tensor, mask: Tensor | None) -> Batch:
        if calls is not None:
            calls.append(ids)
        return Batch.read(policy, ids, mask)

    return read


def spots(current: Any) -> list[tuple[int, int]]:
    return list(zip(current.rows.owner.tolist(), current.rows.position.tolist(), strict=True))


def test_a_whole_prompt_is_read_once_and_ends_in_its_pass(policy: Policy) -> None:
    calls: list[Tensor] = []
    current = whole_prompt(IDS, MASK, reader(policy, calls))
    assert len(calls) == 1
    assert spots(current) == [(0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5)]
    assert (current.start, current.width, current.reads_end) == (0, 6, True)
    with pytest.raises(SafeguardError, match="other masks than one per token"):
        whole_prompt(IDS, MASK[:, :3], reader(policy))


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 2, 3, 4, 5, 6), (0, 4, 6), (0, 5, 6)])
def test_chunks_of_a_prompt_are_located_and_read_once(
    policy: Policy, cuts: tuple[int, ...]
) -> None:
    calls: list[Tensor] = []
    prompt, seen, ends = Prompt(IDS, MASK), [], []
    for start, stop in pairwise(cuts):
        current = prompt.locate(IDS[:, start:stop], MASK, start, reader(policy, calls))
        if current is None:
            ends.append(False)
            continue
        seen += [(owner, start + position) for owner, position in spots(current)]
        ends.append(current.reads_end)
    assert sorted(seen) == [(0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5)]
    assert ends == [False] * (len(cuts) - 2) + [True]
    assert len(calls) == 1


def test_beams_are_copies_of_their_prompts(policy: Policy) -> None:
    prompt = Prompt(IDS, MASK)
    current = prompt.locate(IDS.repeat_interleave(3, dim=0), None, 0, reader(policy))
    assert current is not None
    assert len(current.batch) == 6
    texts = current.batch.texts
    assert texts == [(7, 8, 9)] * 3 + [(5, 6, 10, 11, 12)] * 3


@pytest.mark.parametrize(
    ("ids", "cached", "message"),
    [
        (IDS + 1, 0, "other tokens than the prompt"),
        (IDS[:, 1:], 0, "other tokens than the prompt"),
        (torch.cat([IDS, IDS[:1]]), 0, "rows cannot be told apart"),
        (torch.tensor([[9], [12]]), 6, "already holds the whole prompt"),
    ],
)
def test_passes_that_are_not_of_the_prompt_are_refused(
    policy: Policy, ids: Tensor, cached: int, message: str
) -> None:
    with pytest.raises(SafeguardError, match=message):
        Prompt(IDS, MASK).locate(ids, MASK, cached, reader(policy))


def test_padding_on_the_right_is_refused(policy: Policy) -> None:
    with pytest.raises(SafeguardError, match="Pad on the left"):
        Prompt(IDS.flip(1), MASK.flip(1)).locate(IDS.flip(1), None, 0, reader(policy))


@pytest.mark.parametrize("span", list(Span))
def test_an_answers_tokens_are_edited_as_the_span_says(policy: Policy, span: Span) -> None:
    """Row 0 follows the refusal prefix for two tokens, row 1 for one."""
    policy = replace(policy, edit=Refuse(span=span))
    prompt = Prompt(IDS, MASK)
    first = prompt.locate(IDS, MASK, 0, reader(policy))
    assert first is not None
    prompt.answering = first.batch.finished = True
    answers = torch.tensor([[20, 21, 30], [20, 30, 30]])
    seen = []
    for step in range(3):
        prompt.prepare(torch.cat([IDS, answers[:, : step + 1]], dim=1), 1)
        current = prompt.answer(answers[:, step : step + 1])
        seen.append([] if current is None else [owner for owner, _ in spots(current)])
    assert (
        seen
        == {
            Span.LAST: [[], [], []],
            Span.REQUEST: [[], [], []],
            Span.OPENING: [[0, 1], [0], []],
            Span.ANSWER: [[0, 1], [0, 1], [0, 1]],
        }[span]
    )


def test_drafts_behind_the_prompt_are_read_with_it(policy: Policy) -> None:
    prompt = Prompt(IDS, MASK)
    drafts = torch.tensor([[20, 21], [20, 9]])
    prompt.prepare(torch.cat([IDS, drafts], dim=1), None)
    current = prompt.locate(torch.cat([IDS, drafts], dim=1), None, 0, reader(policy))
    assert current is not None
    assert current.reads_end
    assert {spot for spot in spots(current) if spot[1] > 5} == {(0, 6), (0, 7), (1, 6)}


def test_a_cache_is_gone_on_from_one_token_at_a_time(policy: Policy) -> None:
    batch = whole_prompt(IDS, MASK, reader(policy)).batch
    token = torch.tensor([[20], [3]])
    for unknown in (None, batch):  # not filled under this guard, or not to its end
        with pytest.raises(SafeguardError, match="not filled under this guard"):
            one_more_token(unknown, token)
    batch.finished = True
    with pytest.raises(SafeguardError, match="2 new tokens"):
        one_more_token(batch, token.repeat(1, 2))
    with pytest.raises(SafeguardError, match="batch changed from 2 to 1"):
        one_more_token(batch, token[:1])
    current = one_more_token(batch, token)
    assert current is not None
    assert spots(current) == [(0, 0)]
    assert one_more_token(batch, torch.tensor([[9], [21]])) is None
