"""What vLLM's workers read and edited of a request, put together and checked against the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.engines.vllm.plain import from_bytes


def states_of(
    mark: Mark, layers: Sequence[int], shown: Sequence[Mapping[str, Any] | None]
) -> dict[int, torch.Tensor]:
    """Layer → (1, hidden) float32 states of the row that the mark asks for.

    Under pipeline parallelism each worker has layers of its own; under tensor parallelism several
    have the same ones, whose states are replicated.

    Args:
        mark: of the request.
        layers: that are to be read, and no others.
        shown: of each worker, what it read (`Passes.take`).

    Raises:
        ValueError: what was read is not what was to be.
    """
    states: dict[int, torch.Tensor] = {}
    for worker, each in enumerate(shown):
        if each is None:
            raise ValueError(f"worker {worker} kept no states of it")
        if (each["policy"], each["position"]) != (mark.policy, mark.position):
            raise ValueError(
                f"worker {worker} read token {each['position']} under policy "
                f"{each['policy'][:12]}, not token {mark.position} under {mark.policy[:12]}"
            )
        for number, values in each["states"].items():
            states[int(number)] = from_bytes(values)[None]
    if sorted(states) != sorted(layers):
        raise ValueError(f"of layers {list(layers)}, {sorted(states)} were read")
    missed = [number for number, each in states.items() if not torch.isfinite(each).all()]
    if missed:
        raise ValueError(f"the states of layers {missed} were not read, or are not finite")
    return states


def coordinates_of(
    mark: Mark, layers: Sequence[int], shown: Sequence[Mapping[str, Any] | None]
) -> dict[int, torch.Tensor]:
    """Layer → (n, m) float32 coordinates of the n tokens that the mark asks for.

    Args:
        mark: of the request.
        layers: that the policy edits.
        shown: of each worker, what it read (`Passes.take`), which `states_of` has checked.

    Raises:
        ValueError: some are missing.
    """
    if not mark.tokens:
        return {}
    seen: dict[int, torch.Tensor] = {}
    for each in shown:
        for number, values in (each or {})["coordinates"].items():
            seen[int(number)] = from_bytes(values).view(len(mark.tokens), -1)
    if sorted(seen) != sorted(layers):
        raise ValueError(f"of the edited layers {list(layers)}, {sorted(seen)} were read")
    missed = [number for number, each in seen.items() if not torch.isfinite(each).all()]
    if missed:
        raise ValueError(f"not all tokens' coordinates were read in layers {missed}")
    return seen


def check_edited(mark: Mark, shown: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse an answer of which workers did not edit what was planned, before any of it is given.

    Args:
        mark: of the request.
        shown: of each worker, what it edited (`Passes.take_edited`).

    Raises:
        ValueError: what differs.
    """
    plan = mark.edit
    assert plan is not None, "a request that is not edited is not asked for edits"
    layers: set[int] = set()
    for worker, each in enumerate(shown):
        if each is None:
            raise ValueError(f"worker {worker} edited nothing of it")
        if each["positions"] != list(plan.positions):
            raise ValueError(
                f"worker {worker} edited tokens {each['positions']}, not {list(plan.positions)}"
            )
        layers |= set(each["layers"])
    if layers != set(plan.layers):
        raise ValueError(f"of layers {list(plan.layers)}, {sorted(layers)} were edited")
