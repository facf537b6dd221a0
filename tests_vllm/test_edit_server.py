"""vLLM's own server under a guard that edits: the answers of transformers' hooks, and a storm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_checkpoint
from vllm_agreement import by_hooks, compared, inside_vllm, requests
from vllm_server import Client, serving
from vllm_storm import SMALL_CACHE, weathered
from vlm_safeguard import Guard
from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading import Loading, load_model
from vlm_safeguard.model.vlm import VLM

pytestmark = pytest.mark.xdist_group("pocket")  # they share a checkpoint and its guard

TOKENS = 12


@pytest.fixture(scope="module")
def editing(checkpoints: tuple[Path, Path]) -> tuple[Guard, Path]:
    """VLM-Guard's edit behind the default gate, and its folder."""
    made = vllm_checkpoint.editing(checkpoints[1])
    return Guard.from_pretrained(made), made


@pytest.fixture(scope="module")
def server(
    folder: Path, checkpoints: tuple[Path, Path], editing: tuple[Guard, Path]
) -> Iterator[Client]:
    """Its cache is so small that requests are preempted."""
    log, order = folder / "editing.log", Order.FIRST
    with serving(checkpoints[0], log, *SMALL_CACHE, guard=editing[1], order=order) as client:
        yield client


def test_edited_answers_are_those_of_transformers(
    server: Client, checkpoints: tuple[Path, Path], editing: tuple[Guard, Path]
) -> None:
    vlm = VLM(*load_model(str(checkpoints[0]), Loading(dtype="float32")))
    asked = requests(3)
    inside = inside_vllm(server, asked, TOKENS, 8)
    hooks = by_hooks(vlm, editing[0], asked, TOKENS)
    rows = [compared(*each, editing[0].policy) for each in zip(asked, inside, hooks, strict=True)]
    opened = [reply for reply in inside if reply.guard["open"]]
    assert len(opened) >= 6
    assert {reply.guard["response"] for reply in opened} == {"edit"}
    for row in rows:
        assert row.decided_alike or row.near, row
        assert row.answered_alike or row.near, row
    assert sum(row.answers[0] == row.answers[1] for row in rows) >= len(rows) - 2


def test_a_storm_of_edited_requests(server: Client) -> None:
    """Edited and unedited side by side, of the same images and texts: none has another's keys."""
    distinct = requests(2)
    asked = [distinct[7 * n % len(distinct)] for n in range(32)]
    made = server.run(weathered(server, distinct, asked, 200.0, TOKENS, 0))
    assert made.answered + made.left == len(asked)
    assert made.preempted > 0, "the cache was to be too small"
    assert (made.unguarded, made.decided_otherwise, made.contaminated) == (0, 0, 0)
    assert made.failed == ()


def test_an_edit_beside_the_verdict_is_refused(
    folder: Path, checkpoints: tuple[Path, Path], editing: tuple[Guard, Path]
) -> None:
    with (
        pytest.raises(SafeguardError, match="--guard-order auto or first"),
        serving(checkpoints[0], folder / "together.log", guard=editing[1], order=Order.TOGETHER),
    ):
        pass
