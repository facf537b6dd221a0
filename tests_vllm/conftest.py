"""A guarded vLLM server on the Pocket VLM, which all tests ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_checkpoint import checkpoint
from vllm_server import Client, serving
from vllm_storm import SMALL_CACHE
from vlm_safeguard import Guard
from vlm_safeguard.engines.vllm.order import Order


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def checkpoints(folder: Path) -> tuple[Path, Path]:
    """The model's folder and its guard's."""
    return checkpoint(folder)


@pytest.fixture(scope="session")
def guard(checkpoints: tuple[Path, Path]) -> Guard:
    return Guard.from_pretrained(checkpoints[1])


@pytest.fixture(scope="session", params=list(Order))
def server(
    request: pytest.FixtureRequest, folder: Path, checkpoints: tuple[Path, Path]
) -> Iterator[Client]:
    """In each order; its cache is so small that requests are preempted."""
    model, guard = checkpoints
    log = folder / f"{request.param}.log"
    with serving(model, log, *SMALL_CACHE, guard=guard, order=request.param) as client:
        yield client
