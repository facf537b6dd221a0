"""The states that vLLM's workers read of a request, put together and checked against the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlm_safeguard.engines.vllm.marks import Mark


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
            states[int(number)] = torch.frombuffer(bytearray(values), dtype=torch.float32)[None]
    if sorted(states) != sorted(layers):
        raise ValueError(f"of layers {list(layers)}, {sorted(states)} were read")
    missed = [number for number, each in states.items() if not torch.isfinite(each).all()]
    if missed:
        raise ValueError(f"the states of layers {missed} were not read, or are not finite")
    return states
