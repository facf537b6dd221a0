"""Flattened rows: which they are, however a pass cuts them, and both edits of them by hand."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from support.reference import target
from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.edits import Add, Drift, Edit, Project, Refuse, Restore
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.media import Media
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.request import Request, read_request
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.rows import Rows, edit_masked, edit_rows, token_starts
from vlm_safeguard.policy.span import Span
from vlm_safeguard.policy.subspace import Subspace
from vlm_safeguard.policy.text_view import TextView

pytestmark = pytest.mark.versions

IMAGE = 4
VIEW = TextView(frozenset({IMAGE}))
PROMPTS = [
    [7, 8, IMAGE, IMAGE, 9, 10],
    [11, IMAGE, IMAGE, 12, IMAGE, 13],
    [14, 15],
    [7, 8, IMAGE, 9, 10],  # the same text as the first
]
PREFIX = (20, 21, 22)


def policy(span: Span) -> Policy:
    """One that edits nothing but this span, of a model whose generation prompt is not known."""
    zeros = torch.zeros(1, 1)
    directions = Directions(zeros[None], zeros, zeros, zeros, zeros[0])
    return Policy(directions, zeros, (0,), 1, Refuse(span=span), GATES["open"], VIEW, Response.EDIT)


def requests(span: Span) -> list[Request]:
    return [read_request(policy(span), prompt) for prompt in PROMPTS]


# --- requests ---


def test_a_request_is_its_text_and_the_tokens_that_may_be_edited() -> None:
    first, second, third, _ = requests(Span.REQUEST)
    assert first.text == (7, 8, 9, 10)
    assert first.spanned == ((4, 2), (5, 3))
    assert (first.last, first.media) == (5, Media(images=1, tokens=2))
    assert second.text == (11, 12, 13)
    assert second.spanned == ((3, 1), (5, 2))
    assert second.media == Media(images=2, tokens=3)
    assert third.spanned == ((1, 1),)  # no image: the last token only
    assert [request.spanned for request in requests(Span.LAST)] == [
        ((5, 3),),
        ((5, 2),),
        ((1, 1),),
        ((4, 3),),
    ]
    with pytest.raises(ValueError, match="no text"):
        read_request(policy(Span.LAST), [IMAGE, IMAGE])


def test_tokens_are_counted_through_different_texts() -> None:
    texts = [(1, 2), (3,), (1, 2), (4, 5, 6)]
    assert token_starts(texts, 0) == {(1, 2): 0, (3,): 2, (4, 5, 6): 3}
    assert token_starts(texts, 2) == {(1, 2): 0, (3,): 4, (4, 5, 6): 7}


# --- rows ---

Entry = tuple[int, int, int, bool]


def entries(rows: Rows) -> list[Entry]:
    return sorted(
        zip(
            rows.owner.tolist(),
            rows.position.tolist(),
            rows.token.tolist(),
            rows.last.tolist(),
            strict=True,
        )
    )


def by_hand(answers: list[list[int]], among: list[bool], span: Span) -> list[Entry]:
    """Every row of the prompts and answers, one token at a time; positions are the requests'."""
    found: list[Entry] = []
    start: dict[tuple[int, ...], int] = {}
    for owner, request in enumerate(requests(span)):
        if request.text not in start:
            start[request.text] = sum(len(text) + len(PREFIX) for text in list(start))
        first = start[request.text]
        for position, token in request.spanned:
            found.append((owner, position, first + token, position == request.last))
        end = first + len(request.text) - 1
        following = True
        for place, token in enumerate(answers[owner]):
            following = following and place < len(PREFIX) and token == PREFIX[place]
            position = request.last + 1 + place
            if span is Span.ANSWER:
                found.append((owner, position, end, True))
            elif span is Span.OPENING and following and among[owner]:
                found.append((owner, position, end + 1 + place, False))
    return sorted(found)


def rows_in(span: Span, answers: list[list[int]], among: list[bool], start: int, stop: int) -> Rows:
    """As an engine puts them together for a pass over left-padded rows, of positions there."""
    width = max(map(len, PROMPTS))
    left = torch.tensor([width - len(prompt) for prompt in PROMPTS])
    rows = Rows.of(requests(span), len(PREFIX)).moved(left)
    found = rows.between(start, stop)
    ends = rows.token[rows.last]
    after = max(stop - width, 0)
    if span is Span.ANSWER and after:
        first = max(width, start)
        found += Rows.of_answers(ends, first - start, stop - start)
    if span is Span.OPENING and after:
        spoken = torch.where(torch.tensor(among), 0, len(PREFIX))
        answered = torch.tensor(answers)[:, :after]
        found += Rows.of_openings(ends, answered, PREFIX, spoken, stop - start)
    return found


@pytest.mark.parametrize("span", list(Span))
@pytest.mark.parametrize("seed", range(6))
def test_any_cut_into_passes_gives_the_same_rows(span: Span, seed: int) -> None:
    """Chunks at whatever boundaries, drafts behind the prompt, and one token after the other."""
    rng = random.Random(seed)
    answers = [[*PREFIX[: rng.randint(0, 3)], 30, 31, 32, 33][:4] for _ in PROMPTS]
    among = [rng.random() < 0.7 for _ in PROMPTS]
    width = max(map(len, PROMPTS))
    total = width + len(answers[0])
    cuts = sorted({0, total, *rng.sample(range(1, total), rng.randint(0, total - 1))})
    found: list[Entry] = []
    for start, stop in pairwise(cuts):
        for owner, position, token, last in entries(rows_in(span, answers, among, start, stop)):
            found.append((owner, start + position - (width - len(PROMPTS[owner])), token, last))
    assert sorted(found) == by_hand(answers, among, span)


def test_rows_follow_their_owners() -> None:
    """Beams and batches put requests in another order: rows are looked up, not remembered."""
    order = [2, 0, 3, 1]
    made = requests(Span.REQUEST)
    rows, turned = Rows.of(made, 0), Rows.of([made[i] for i in order], 0)
    starts = (token_starts([r.text for r in each], 0) for each in (made, [made[i] for i in order]))
    here, there = starts
    mine = [(o, p, t - here[made[o].text], x) for o, p, t, x in entries(rows)]
    theirs = [(order[o], p, t - there[made[order[o]].text], x) for o, p, t, x in entries(turned)]
    assert sorted(theirs) == mine


# --- both edits ---

STATES, HIDDEN, RANK = 9, 11, 3
EDITS = [
    Restore(),
    Restore(0.4, one_sided=False),
    Refuse(),
    Refuse(-0.5),
    Project(),
    Drift(),
    Add(),
]


def made() -> tuple[Tensor, Subspace, Tensor, Tensor]:
    """Random float64 states, a subspace, text coordinates, and which rows are a prompt's last."""
    torch.manual_seed(0)
    V = torch.linalg.qr(torch.randn(HIDDEN, RANK).double()).Q.mT
    subspace = Subspace(V, torch.randn(RANK).double(), torch.randn(RANK).double())
    text = torch.randn(STATES, RANK).double()
    return torch.randn(STATES, HIDDEN).double(), subspace, text, torch.arange(STATES) % 2 == 0


def closed_form(edit: Edit, row: int) -> Tensor:
    hidden, subspace, text, last = made()
    state = hidden[row].clone()
    for k in range(RANK):
        now = float(hidden[row] @ subspace.V[k])
        harmful = float(subspace.harmful[k]) if last[row] else -math.inf
        goal = target(
            edit.name,
            k,
            now,
            float(text[row, k]),
            harmful,
            float(subspace.drift[k]),
            getattr(edit, "one_sided", True),
        )
        state += edit.strength * (goal - now) * subspace.V[k]
    return state


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.name} {edit.strength}")
def test_both_edits_are_the_closed_form_and_leave_other_rows_alone(edit: Edit) -> None:
    hidden, subspace, text, last = made()
    index = torch.tensor([7, 0, 3])
    mask = torch.zeros(STATES, dtype=torch.bool)
    mask[index] = True
    by_index = edit_rows(
        edit, hidden, subspace.V, index, subspace.reference(text[index], last[index])
    )
    by_mask = edit_masked(edit, hidden, subspace.V, mask, subspace.reference(text, last))
    for row in range(STATES):
        if mask[row]:
            for edited in (by_index, by_mask):
                torch.testing.assert_close(
                    edited[row], closed_form(edit, row), rtol=1e-10, atol=1e-10
                )
        else:
            assert torch.equal(by_index[row], hidden[row])
            assert torch.equal(by_mask[row], hidden[row])


def test_a_masked_row_may_hold_anything_where_it_is_closed() -> None:
    hidden, subspace, text, last = made()
    hidden[4] = torch.nan
    mask = torch.arange(STATES) != 4
    edited = edit_masked(Restore(), hidden, subspace.V, mask, subspace.reference(text, last))
    assert torch.isfinite(edited[mask]).all()
    assert torch.isnan(edited[4]).all()


def test_half_precision_states_are_edited_in_float32() -> None:
    hidden, subspace, text, last = made()
    narrow = hidden.bfloat16()
    wide = Subspace(subspace.V.float(), subspace.harmful.float(), subspace.drift.float())
    index = torch.arange(STATES)
    at = wide.reference(text.float(), last)
    edited = edit_rows(Refuse(), narrow, wide.V, index, at)
    assert edited.dtype == torch.bfloat16
    expected = edit_rows(Refuse(), narrow.float(), wide.V, index, at)
    assert torch.equal(edited, expected.bfloat16())
