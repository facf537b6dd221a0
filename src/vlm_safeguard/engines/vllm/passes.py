"""What a worker reads in the passes that it makes: which rows of states are whose last ones.

Chunked prefill gives a pass some of a prompt's tokens, and preemption gives them to it again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from vlm_safeguard.engines.vllm.layers import WatchedLayers
from vlm_safeguard.engines.vllm.marks import KEPT, Mark
from vlm_safeguard.engines.vllm.plain import to_bytes
from vlm_safeguard.engines.vllm.scheduled import Admitted, Scheduled, placed

T = TypeVar("T")


def rows_read(batch: Iterable[Scheduled], positions: Mapping[str, int | None]) -> dict[str, int]:
    """Request → the flattened row that is read of it, where that stands in this pass.

    Args:
        positions: of each request, the token that is to be read; None where nothing is.
    """
    rows = {}
    for row, part in placed(batch):
        position = positions[part.request]
        if position is not None and part.start <= position < part.start + part.count:
            rows[part.request] = row + position - part.start
    return rows


class Passes:
    """The passes of one worker."""

    def __init__(self, layers: WatchedLayers) -> None:
        """Of these layers."""
        self._layers = layers
        self._marks: dict[str, Mark] = {}
        self._positions: dict[str, int | None] = {}
        self._asked: list[str] = []  # requests that the current pass reads, in the buffers' order
        self._kept: OrderedDict[str, tuple[Mark, dict[int, torch.Tensor]]] = OrderedDict()

    def admit(self, new: Iterable[Admitted], finished: Iterable[str]) -> None:
        """Take note of requests that come and go."""
        for request in finished:
            self._marks.pop(request, None)
            self._positions.pop(request, None)
        for each in new:
            last = each.mark.position == -1
            self._marks[each.request] = each.mark
            self._positions[each.request] = each.prompt - 1 if last else each.mark.position

    def begin(self, batch: Sequence[Scheduled]) -> None:
        """A pass over these comes next."""
        rows = rows_read(batch, self._positions)
        self._asked = list(rows)
        if rows:
            self._layers.choose(list(rows.values()))

    def end(self) -> None:
        """The pass was made: keep what was read."""
        for place, request in enumerate(self._asked):
            mark = self._marks[request]
            assert mark.name is not None, "what is read has a name"
            keep(self._kept, mark.name, (mark, self._layers.read(place)))
        if self._asked:
            self._layers.forget()
        self._asked = []

    def take(self, names: Iterable[str]) -> list[dict[str, Any] | None]:
        """What was read under these names, in plain values, and kept no longer.

        Of each the policy, the position, and of each layer of this worker its float32 states as
        bytes; None where nothing is kept.
        """
        taken: list[dict[str, Any] | None] = []
        for name in names:
            if name not in self._kept:
                taken.append(None)
                continue
            mark, states = self._kept.pop(name)
            shown = {str(n): to_bytes(x) for n, x in states.items()}
            taken.append({"policy": mark.policy, "position": mark.position, "states": shown})
        return taken


def keep(kept: OrderedDict[str, T], name: str, value: T) -> None:
    """Keep it as the newest; the oldest ones go where there are more than `KEPT`."""
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > KEPT:
        kept.popitem(last=False)
