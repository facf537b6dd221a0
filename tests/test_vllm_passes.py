"""Inside vLLM's workers: which rows of a pass are read, and what comes of what is read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from support.vllm import Layer
from vlm_safeguard.engines.vllm import layers, passes
from vlm_safeguard.engines.vllm.layers import WatchedLayers
from vlm_safeguard.engines.vllm.marks import KEY, Mark
from vlm_safeguard.engines.vllm.passes import Passes, rows_read
from vlm_safeguard.engines.vllm.scheduled import Admitted, Scheduled
from vlm_safeguard.engines.vllm.states import states_of
from vlm_safeguard.errors import SafeguardError

POLICY, WIDTH, WATCHED = "a" * 64, 4, (0, 2)


class Elsewhere(torch.nn.Module):
    """A layer of another stage."""


class Model:
    """Three layers, and the worker's passes over them."""

    def __init__(self, capacity: int = 8, missing: Sequence[int] = ()) -> None:
        torch.manual_seed(0)
        self.layers: list[torch.nn.Module] = [
            Elsewhere() if n in missing else Layer(WIDTH) for n in range(3)
        ]
        self.passes = self.watch(capacity)

    def watch(self, capacity: int) -> Passes:
        watched = WatchedLayers(
            self.layers,
            WATCHED,
            hidden_size=WIDTH,
            capacity=capacity,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        return Passes(watched)

    @torch.no_grad()
    def run(self, batch: Sequence[Scheduled], tokens: dict[str, torch.Tensor]) -> None:
        """One pass over parts of requests whose tokens are embedded already."""
        self.passes.begin(batch)
        hidden = torch.cat([tokens[x.request][x.start : x.start + x.count] for x in batch])
        residual = None
        for layer in self.layers:
            if not isinstance(layer, Elsewhere):
                hidden, residual = layer(hidden, residual)
        self.passes.end()

    @torch.no_grad()
    def states(self, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        """By hand: no token attends to another here."""
        state, states = tokens, {}
        for number, layer in enumerate(self.layers):
            state = state + (state @ layer.get_parameter("weight")).tanh()
            states[number] = state
        return states


def arguments(**more: object) -> dict[str, object]:
    return {KEY: {"policy": POLICY, **more}}


def given(name: str, arguments: dict[str, Any] | None, length: int) -> Admitted:
    return Admitted.of(POLICY, name, arguments, length)


def mark_of(name: str, position: int) -> Mark:
    return Mark(policy=POLICY, name=name, position=position)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_any_chunks_in_any_order_read_the_same_states(
    seed: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_in_graph", lambda states: graphs)
    dice, model = random.Random(seed), Model()
    tokens = {str(n): torch.randn(dice.randint(1, 9), WIDTH) for n in range(dice.randint(1, 4))}
    places = {name: dice.randrange(len(x)) for name, x in tokens.items()}
    new = [
        given(name, arguments(name=f"r{name}", position=places[name]), len(x))
        for name, x in tokens.items()
    ]
    model.passes.admit(new, [])
    done = dict.fromkeys(tokens, 0)
    while left := [name for name, x in tokens.items() if done[name] < len(x)]:
        some = dice.sample(left, dice.randint(1, len(left)))
        counts = {name: dice.randint(1, len(tokens[name]) - done[name]) for name in some}
        model.run([Scheduled(name, done[name], counts[name], ()) for name in some], tokens)
        for name in some:
            done[name] += counts[name]
    taken = model.passes.take([f"r{name}" for name in tokens])
    for name, shown in zip(tokens, taken, strict=True):
        states = states_of(mark_of(f"r{name}", places[name]), WATCHED, [shown])
        for layer, expected in model.states(tokens[name]).items():
            if layer in WATCHED:
                torch.testing.assert_close(states[layer][0], expected[places[name]])


def test_a_request_that_is_computed_again_is_read_again() -> None:
    model = Model()
    tokens = {"a": torch.randn(3, WIDTH)}
    model.passes.admit([given("a", arguments(name="r", position=2), 3)], [])
    for _ in range(2):
        model.run([Scheduled("a", 0, 3, ())], tokens)
    (shown,) = model.passes.take(["r"])
    assert model.passes.take(["r"]) == [None]
    states = states_of(mark_of("r", 2), WATCHED, [shown])
    torch.testing.assert_close(states[2][0], model.states(tokens["a"])[2][2])


def test_the_last_token_of_a_prompt_is_read() -> None:
    model = Model()
    tokens = {"a": torch.randn(5, WIDTH)}  # of which the last two are of the answer
    model.passes.admit([given("a", arguments(name="r", position=-1), 3)], [])
    model.run([Scheduled("a", 0, 4, ())], tokens)
    model.run([Scheduled("a", 4, 1, ())], tokens)
    states = states_of(mark_of("r", -1), WATCHED, model.passes.take(["r"]))
    torch.testing.assert_close(states[2][0], model.states(tokens["a"])[2][2])


@pytest.mark.parametrize("graphs", [True, False])
def test_without_graphs_what_is_not_asked_for_is_not_gathered(
    graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_in_graph", lambda states: graphs)
    model = Model(capacity=4)
    buffer = model.layers[2].get_buffer("guard_states").fill_(9.0)
    model.passes.admit([given("a", arguments(name="r", position=1), 2)], [])
    model.run([Scheduled("a", 0, 2, ())], {"a": torch.randn(2, WIDTH)})
    written = (buffer != 9.0).any(1).tolist()
    assert written == ([True] * 4 if graphs else [True, False, False, False])


def test_a_request_that_reads_nothing_is_let_through() -> None:
    model = Model()
    model.passes.admit([given("a", arguments(), 2)], [])
    model.run([Scheduled("a", 0, 2, ())], {"a": torch.randn(2, WIDTH)})
    assert rows_read([Scheduled("a", 0, 2, ())], {"a": None}) == {}


@pytest.mark.parametrize("given_", [None, {}, {"other": 1}, {KEY: {}}, {KEY: {"more": 1}}])
def test_a_request_without_a_mark_is_refused(given_: dict[str, object] | None) -> None:
    with pytest.raises(SafeguardError, match="did not come through the guarded client"):
        given("a", given_, 1)


def test_a_request_of_another_policy_is_refused() -> None:
    with pytest.raises(SafeguardError, match="policy bbbbbbbbbbbb came to workers of aaaaaaaaaaaa"):
        given("a", {KEY: {"policy": "b" * 64}}, 1)


def test_the_oldest_readings_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "KEPT", 2)
    model = Model()
    for name in "abc":
        model.passes.admit([given(name, arguments(name=name, position=0), 1)], [])
        model.run([Scheduled(name, 0, 1, ())], {name: torch.randn(1, WIDTH)})
        model.passes.admit([], [name])
    kept = model.passes.take(["a", "b", "c"])
    assert [each is None for each in kept] == [True, False, False]


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    model = Model(capacity=1)
    model.passes.admit([given(n, arguments(name=n, position=0), 1) for n in "ab"], [])
    with pytest.raises(SafeguardError, match="room for 1"):
        model.run(
            [Scheduled(n, 0, 1, ()) for n in "ab"], dict.fromkeys("ab", torch.randn(1, WIDTH))
        )


def read_one(model: Model) -> Any:
    model.passes.admit([given("a", arguments(name="r", position=0), 1)], [])
    model.run([Scheduled("a", 0, 1, ())], {"a": torch.randn(1, WIDTH)})
    (shown,) = model.passes.take(["r"])
    return shown


def test_stages_are_put_together() -> None:
    stages = [read_one(Model(missing=(2,))), read_one(Model(missing=(0, 1)))]
    assert sorted(states_of(mark_of("r", 0), WATCHED, stages)) == [0, 2]
    with pytest.raises(ValueError, match=r"of layers \[0, 2\], \[0\] were read"):
        states_of(mark_of("r", 0), WATCHED, stages[:1])


def test_a_hook_that_is_gone_leaves_no_states() -> None:
    model = Model()
    model.layers[2]._forward_hooks.clear()
    with pytest.raises(ValueError, match=r"layers \[2\] were not read"):
        states_of(mark_of("r", 0), WATCHED, [read_one(model)])


def test_states_that_are_not_of_the_plan_are_no_reading() -> None:
    shown = read_one(Model())
    with pytest.raises(ValueError, match="worker 1 kept no states"):
        states_of(mark_of("r", 0), WATCHED, [shown, None])
    with pytest.raises(ValueError, match="read token 0 under policy"):
        states_of(mark_of("r", 3), WATCHED, [shown])
    with pytest.raises(ValueError, match=r"\[0, 2\] were read"):
        states_of(mark_of("r", 0), (0, 1, 2), [shown])
