"""A short slice of `tests/fuzz.py`, and that what it checks can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from fuzz import came_of, kinds
from fuzzing.cases import ANSWER, END, IMAGE, MARKS, USER, Case, Guarding
from fuzzing.check import check, score
from fuzzing.media import Media
from fuzzing.models import fitted, model, sentences
from fuzzing.options import ALLOWED, REFUSED
from fuzzing.threads import Threads, check_threads
from vlm_safeguard.engines.hooks import attachment, options
from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.editing import Editing
from vlm_safeguard.engines.hooks.turns import Turns
from vlm_safeguard.policy.decision import decide
from vlm_safeguard.policy.edits import Refuse
from vlm_safeguard.policy.gate import TextScore
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span

pytestmark = pytest.mark.xdist_group("fuzz")


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(kinds)
def test_what_has_to_hold_of_every_call_holds(case: Case | Threads | Media) -> None:
    came_of(case)


def test_every_option_has_values() -> None:
    """But the call itself, and what a case gives its prompt by."""
    given_otherwise = {"self", "kwargs", "inputs", "input_ids", "generation_config", "streamer"}
    assert ALLOWED.keys() | given_otherwise == options.ALLOWED
    assert REFUSED.keys() == options.REFUSED.keys()


# --- the checks notice what they are there for ---

SHOWN = [*USER, *IMAGE, 60, 61, *END, *ANSWER]
OTHER = [*USER, 70, 71, 72, *END, *ANSWER]
OPEN = Guarding((1, 2, 3, 4), Refuse(), "open", has_words=False)
CLOSED = Guarding((1, 2, 3, 4), Refuse(), (1e9, None), has_words=False)


def case_of(guarding: Guarding = OPEN, **options: Any) -> Case:
    return Case(
        guarding=guarding,
        prompts=[SHOWN, OTHER],
        pads=1,
        ids="keyword",
        mask="left",
        pixels="right",
        options={"max_new_tokens": 4, "do_sample": False, **options},
        in_config=frozenset(),
        seed=0,
        streamed=False,
        way="model",
        following=None,
    )


def test_the_examples_hold() -> None:
    assert check(case_of(), model(), fitted()) == "answered as by hand, some gate open"
    assert check(case_of(CLOSED), model(), fitted()) == "answered as by hand, closed"
    assert check(case_of(use_mtp=True), model(), fitted()).startswith("refused")


def test_tokens_without_the_edit_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editing, "_edit", lambda self, layer, hidden, rows: hidden.clone())
    with pytest.raises(AssertionError, match="where by hand it is"):
        check(case_of(), model(), fitted())


def test_a_closed_row_that_is_touched_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(self: Editing, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1.0

    monkeypatch.setattr(Editing, "__call__", touched)
    monkeypatch.setattr(Editing, "layers", (1, 2, 3, 4), raising=False)
    guarding = Guarding((1, 2, 3, 4), Refuse(), (1e9, 1e9), has_words=False)
    with pytest.raises(AssertionError, match=r"closed row 0 differs"):
        check(case_of(guarding), model(), fitted())


def test_a_gate_that_misses_a_sentence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [*USER, *IMAGE, 60, 61, *MARKS[:1], 70, 71, 72, *END, *ANSWER]

    def wholes_alone(gate: Any, reads: str, requests: Any, *rest: Any) -> Any:
        return decide(gate, reads, [rows[:1] for rows in requests], *rest)

    policy = replace(fitted().policy, sentences=sentences())
    own = policy.criterion(TextScore)
    assert own is not None
    text = tuple(token for token in both if token != IMAGE[0])
    whole, *alone = (score(policy, model(), each, own.layers) for each in policy.judged(text))
    threshold = max(alone) - 1e-3
    assert threshold > whole
    guarding = CLOSED._replace(gate=(threshold, None), response=Response.TEXT, parts=True)
    case = replace(case_of(guarding), prompts=[both])
    assert check(case, model(), fitted()) == "answered"
    monkeypatch.setattr("vlm_safeguard.engines.hooks.reader.decide", wholes_alone)
    with pytest.raises(AssertionError, match="by hand its gate is open: True"):
        check(case, model(), fitted())


def test_an_option_that_is_let_in_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_safeguard.engines.hooks.door.check_options", lambda *given: None)
    with pytest.raises(AssertionError, match="encoder_repetition_penalty was let in"):
        check(case_of(encoder_repetition_penalty=1.2), model(), fitted())


def test_a_bare_error_of_ours_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "read", lambda *given: None)
    with pytest.raises(AssertionError, match="a bare error of ours"):
        check(case_of(), model(), fitted())


def test_a_missing_receipt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "receipts", lambda *given: list[Receipt]())
    with pytest.raises(AssertionError, match="no receipt"):
        check(case_of(), model(), fitted())


def test_tokens_after_the_block_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if leaving took the guard off and let runs go on."""

    def leave(self: Any, *raised: Any) -> None:
        hooks = self._hooks
        hooks.prompt = None
        self._remove(hooks)

    monkeypatch.setattr(attachment.Attachment, "__exit__", leave)
    monkeypatch.setattr(Turns, "check_may_go_on", lambda self: None)
    threads = Threads(
        guarding=OPEN._replace(edit=Refuse(span=Span.ANSWER)),
        prompts=[[SHOWN]],
        begins=[0.0],
        leaves=0.0,
        pause=0.0,
        how="from within",
    )
    with pytest.raises(AssertionError, match="other tokens than alone"):
        check_threads(threads, model(), fitted())
