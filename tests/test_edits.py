"""Every edit against its closed form, in float64 to 1e-10."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.reference import target
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.edits import (
    EDITS,
    Add,
    Drift,
    Edit,
    Project,
    Reference,
    Refuse,
    Restore,
    edit_from_config,
)
from vlm_safeguard.policy.span import Span

ROWS, HIDDEN = 7, 11
ALL = [Restore(), Restore(one_sided=False), Refuse(), Project(), Drift(), Add()]
NAMES = ["restore", "restore two-sided", "refuse", "project", "drift", "add"]


def case(m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States h(Q), V, states h(q), the harmful mean, and the drift; full-width, float64."""
    torch.manual_seed(seed)
    h, text = torch.randn(2, ROWS, HIDDEN, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(HIDDEN, m, dtype=torch.float64)).Q.T.contiguous()
    harmful, drift = torch.randn(2, HIDDEN, dtype=torch.float64)
    return h, V, text, harmful, drift


def at(V: Tensor, text: Tensor, harmful: Tensor, drift: Tensor) -> Reference:
    return Reference(text=text @ V.T, harmful=V @ harmful, drift=V @ drift)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strength", [1.0, 0.0, 0.4, 2.5, -1.0])
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("edit", ALL, ids=NAMES)
def test_edit_equals_a_plain_loop(edit: Edit, m: int, strength: float) -> None:
    h, V, text, harmful, drift = case(m)
    edited = replace(edit, strength=strength)(h, V, at(V, text, harmful, drift))
    one_sided = getattr(edit, "one_sided", True)
    for i in range(ROWS):
        expected = h[i].clone()
        for k in range(m):
            now, want, high, shift = (float(x @ V[k]) for x in (h[i], text[i], harmful, drift))
            goal = target(edit.name, k, now, want, high, shift, one_sided)
            expected += strength * (goal - now) * V[k]
        close(edited[i], expected)
    assert strength == 0 or not torch.allclose(edited, h)


@pytest.mark.parametrize("m", [1, 5])
def test_the_papers_own_formulas(m: int) -> None:
    h, V, text, harmful, drift = case(m)
    where = at(V, text, harmful, drift)
    P, eye = V.T @ V, torch.eye(HIDDEN, dtype=torch.float64)
    close(Project()(h, V, where), h @ (eye - P))
    close(Restore(one_sided=False)(h, V, where), h @ (eye - P) + text @ P)
    close(Add(strength=0.7)(h, V, where), h + 0.7 * text @ P)
    close(Drift()(h, V, where), h - drift @ P)
    # One-sided: what the harm coordinate would lose is given back.
    lost = (h @ V[0] - text @ V[0]).clamp(min=0)
    close(Restore()(h, V, where), h @ (eye - P) + text @ P + lost[:, None] * V[0])
    short = (harmful @ V[0] - torch.maximum(h @ V[0], text @ V[0])).clamp(min=0)
    close(Refuse()(h, V, where), Restore()(h, V, where) + short[:, None] * V[0])


@pytest.mark.parametrize("edit", [Restore(), Refuse()], ids=["restore", "refuse"])
def test_the_harm_coordinate_is_never_lowered(edit: Edit) -> None:
    lowered = 0
    for seed in range(20):
        h, V, text, harmful, drift = case(3, seed)
        after = edit(h, V, at(V, text, harmful, drift)) @ V[0]
        assert (after >= h @ V[0] - 1e-12).all()
        lowered += int((text @ V[0] < h @ V[0]).sum())
    assert lowered > 20  # the text alone would have lowered it


@pytest.mark.parametrize("edit", ALL[:4], ids=NAMES[:4])
def test_editing_twice_is_editing_once(edit: Edit) -> None:
    h, V, text, harmful, drift = case(3)
    where = at(V, text, harmful, drift)
    once = edit(h, V, where)
    close(edit(once, V, where), once)


def test_add_and_drift_do_compound() -> None:
    h, V, text, harmful, drift = case(3)
    where = at(V, text, harmful, drift)
    for edit in (Add(), Drift()):
        once = edit(h, V, where)
        close(edit(once, V, where) - once, once - h)


@pytest.mark.parametrize("edit", ALL, ids=NAMES)
def test_nothing_outside_the_subspace_moves_and_rows_are_alone(edit: Edit) -> None:
    h, V, text, harmful, drift = case(3)
    where = at(V, text, harmful, drift)
    edited = edit(h, V, where)
    close((edited - h) - (edited - h) @ V.T @ V, torch.zeros_like(h))
    one = edit(h[2:3], V, replace(where, text=(text @ V.T)[2:3]))
    close(one[0], edited[2])


def test_restore_of_an_unchanged_request_changes_nothing() -> None:
    h, V, _, harmful, drift = case(3)
    for edit in ALL[:2]:
        close(edit(h, V, at(V, h, harmful, drift)), h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edit", ALL, ids=NAMES)
def test_half_precision_states_are_edited_in_float32(edit: Edit, dtype: torch.dtype) -> None:
    h, V, text, harmful, drift = case(3)
    exact = at(V, text, harmful, drift)
    assert exact.text is not None
    assert exact.drift is not None
    single = Reference(exact.text.float(), exact.harmful.float(), exact.drift.float())
    edited = edit(h.to(dtype), V.float(), single)
    assert edited.dtype == dtype
    expected = edit(h.to(dtype).double(), V, exact).to(dtype)
    torch.testing.assert_close(edited, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_needs() -> None:
    assert {e.name for e in ALL if e.needs_text} == {"restore", "refuse", "add"}
    assert {e.name for e in ALL if e.needs_drift} == {"drift"}
    assert {e.name for e in ALL if e.edits_text} == {"project", "add"}
    h, V, _, harmful, _ = case(2)
    nothing = Reference(text=None, harmful=V @ harmful)
    for edit in ALL:
        if edit.needs_text or edit.needs_drift:
            with pytest.raises(AssertionError):
                edit(h, V, nothing)
        else:
            edit(h, V, nothing)


@pytest.mark.parametrize("edit", [*ALL, Refuse(strength=0.3), Refuse(span=Span.LAST)])
def test_config_comes_back(edit: Edit) -> None:
    config = edit.to_config()
    assert config["name"] == edit.name
    assert edit_from_config(config) == edit
    assert config["name"] == edit.name  # not eaten
    assert type(edit_from_config({"name": edit.name})) is EDITS[edit.name]


def test_unknown_edits_and_parameters_are_refused() -> None:
    with pytest.raises(SafeguardError, match=r"no edit 'remove'.*restore, refuse"):
        edit_from_config({"name": "remove"})
    with pytest.raises(SafeguardError, match="no edit 'None'"):
        edit_from_config({})
    with pytest.raises(SafeguardError, match="'project' does not take"):
        edit_from_config({"name": "project", "one_sided": True})
    for name in EDITS:
        for span in ("first", "Request", "", None, 1):
            with pytest.raises(SafeguardError, match=f"'{name}' cannot be read: .*no span"):
                edit_from_config({"name": name, "span": span})


@pytest.mark.parametrize("edit", EDITS.values())
def test_an_edit_of_an_unknown_span_is_not_made(edit: type[Edit]) -> None:
    for span in ("first", "", None, True):
        with pytest.raises(SafeguardError, match=f"not {span!r}"):
            edit(span=span)  # type: ignore[arg-type]
        with pytest.raises(SafeguardError, match=f"not {span!r}"):
            replace(edit(), span=span)  # type: ignore[arg-type]


def test_what_the_edits_span() -> None:
    assert {name: edit().span for name, edit in EDITS.items()} == {
        "restore": Span.OPENING,
        "refuse": Span.OPENING,
        "project": Span.LAST,
        "drift": Span.LAST,
        "add": Span.LAST,
    }
    for name in EDITS:
        for span in Span:
            assert edit_from_config({"name": name, "span": str(span)}).span is span


@pytest.mark.parametrize("edit", ALL, ids=NAMES)
def test_what_the_harm_coordinate_is_raised_to_may_differ_from_state_to_state(edit: Edit) -> None:
    """As if each state were edited by itself."""
    h, V, text, _, drift = case(3)
    each = torch.randn(ROWS, HIDDEN, dtype=torch.float64)
    edited = edit(h, V, Reference(text=text @ V.T, harmful=each @ V.T, drift=V @ drift))
    for i in range(ROWS):
        alone = edit(h[i : i + 1], V, at(V, text[i : i + 1], each[i], drift))
        close(edited[i], alone[0])
