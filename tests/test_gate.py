"""Gates against plain loops; the threshold against leave-one-out counting."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from vlm_safeguard.policy.directions import Directions, fit_directions
from vlm_safeguard.policy.gate import (
    AnyGate,
    CalibratedGate,
    Gate,
    OpenGate,
    PaperGate,
    threshold_for,
)

LAYERS, HIDDEN, ROWS = 5, 8, 6


@pytest.fixture
def directions() -> Directions:
    torch.manual_seed(0)
    harmful, harmless = torch.randn(2, 10, LAYERS, HIDDEN)
    return fit_directions(harmful + 1, harmless, 2)


@pytest.fixture
def states() -> dict[int, torch.Tensor]:
    torch.manual_seed(1)
    return {layer: torch.randn(ROWS, HIDDEN) + 0.5 for layer in range(LAYERS)}


def test_calibrated_gate(directions: Directions, states: dict[int, torch.Tensor]) -> None:
    expected = []
    for row in range(ROWS):
        total = 0.0
        for layer in (1, 3):
            v = directions.vectors[layer, 0]
            high = float(directions.harmful_mean[layer] @ v)
            low = float(directions.harmless_mean[layer] @ v)
            total += 2 * (float(states[layer][row] @ v) - low) / (high - low) - 1
        expected.append(total / 2)
    for row in range(ROWS):  # a threshold at each row's own score: above it only is open
        gate = CalibratedGate(layers=(1, 3), text_threshold=0, budget=0.1, calibrated_on=9)
        _, scores = gate.text_open(states, directions, (2, 3, 4))
        threshold = float(scores[row])
        gate = gate.model_copy(update={"text_threshold": threshold})
        is_open, again = gate.text_open(states, directions, (2, 3, 4))
        assert torch.equal(scores, again)
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)
        assert is_open.shape == (ROWS, 3)
        for other in range(ROWS):
            assert is_open[other].tolist() == [float(scores[other]) > threshold] * 3
        assert not is_open[row].any()


def test_paper_gate(directions: Directions, states: dict[int, torch.Tensor]) -> None:
    layers = (0, 2, 3)
    is_open, scores = PaperGate().text_open(states, directions, layers)
    for row in range(ROWS):
        expected = [
            sum(float(a * b) for a, b in zip(states[n][row], directions.vectors[n, 0], strict=True))
            > 0
            for n in layers
        ]
        assert is_open[row].tolist() == expected
        assert float(scores[row]) == pytest.approx(sum(expected) / 3)
    assert is_open.any()
    assert not is_open.all()


def test_open_gate_needs_nothing() -> None:
    assert not OpenGate().needs_text
    assert CalibratedGate.needs_text
    assert PaperGate.needs_text
    with pytest.raises(AssertionError):
        OpenGate().text_open({}, None, ())  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.1, 0.29, 0.5])
def test_threshold_keeps_the_budget_and_no_more(budget: float) -> None:
    """Leave one out of n + 1 exchangeable requests: the share that opens is the guarantee."""
    count = 120
    pool = torch.randn(count, generator=torch.Generator().manual_seed(0))
    opened = tighter = 0
    for i in range(count):
        rest = torch.cat([pool[:i], pool[i + 1 :]])
        threshold = threshold_for(rest, budget)
        assert threshold in rest.tolist()
        opened += int(float(pool[i]) > threshold)
        below = [value for value in rest.tolist() if value < threshold]
        tighter += int(float(pool[i]) > max(below, default=-math.inf))
    assert opened / count <= budget
    assert tighter / count > budget  # the next lower threshold would break it


def test_threshold_of_ties_and_small_samples() -> None:
    assert threshold_for(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.4) == 3.0
    assert threshold_for(torch.arange(199.0), 0.005) == 198.0
    with pytest.raises(ValueError, match=r"needs at least 199 .*there are 198"):
        threshold_for(torch.arange(198.0), 0.005)


@pytest.mark.parametrize(
    "gate",
    [
        OpenGate(),
        PaperGate(),
        CalibratedGate(
            layers=(1, 2),
            text_threshold=0.25,
            image_layer=1,
            image_threshold=0.75,
            budget=0.01,
            calibrated_on=200,
        ),
        CalibratedGate(layers=(1,), text_threshold=0.25, budget=0.01, calibrated_on=200),
    ],
    ids=["open", "paper", "calibrated", "text only"],
)
def test_gates_come_back_from_json(gate: Gate) -> None:
    assert TypeAdapter(AnyGate).validate_json(gate.model_dump_json()) == gate


def test_gates_are_strict() -> None:
    adapter: TypeAdapter[AnyGate] = TypeAdapter(AnyGate)
    for bad in ({"name": "ajar"}, {}, {"name": "open", "width": 3}, {"name": "calibrated"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)
    with pytest.raises(ValidationError):
        OpenGate().name = "paper"  # type: ignore[assignment,misc]
    for budget in (0.0, 1.0, -0.1):
        with pytest.raises(ValidationError):
            CalibratedGate(layers=(1,), text_threshold=0, budget=budget, calibrated_on=1)


@pytest.mark.parametrize("name", ["text_threshold", "image_threshold"])
def test_a_threshold_that_is_not_a_number_is_refused(name: str) -> None:
    values = {"text_threshold": 0.0, "image_threshold": 0.0, name: math.nan}
    with pytest.raises(ValidationError):
        CalibratedGate(layers=(1,), image_layer=1, budget=0.1, calibrated_on=1, **values)


def test_image_layer_and_threshold_go_together() -> None:
    for half in ({"image_layer": 1}, {"image_threshold": 0.5}):
        with pytest.raises(ValidationError, match="go together"):
            CalibratedGate(layers=(1,), text_threshold=0, budget=0.1, calibrated_on=1, **half)
