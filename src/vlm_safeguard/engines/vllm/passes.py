"""What a worker does for the guard in the passes that it makes: whose rows stand where.

Rows of a pass are flattened: a request's tokens of it stand one behind the other, and request after
request; chunked prefill gives it some of a prompt's tokens, and preemption gives them to it again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_safeguard.engines.vllm.layers import WatchedLayers
from vlm_safeguard.engines.vllm.marks import KEPT, Mark
from vlm_safeguard.errors import SafeguardError


@dataclass(frozen=True)
class Scheduled:
    """One request's part of a pass.

    Attributes:
        request: its id in the worker.
        start: position of its first token in the pass.
        count: tokens of it in the pass.
    """

    request: str
    start: int
    count: int


def rows_read(batch: Iterable[Scheduled], positions: Mapping[str, int | None]) -> dict[str, int]:
    """Request → the flattened row that is read of it, where that stands in this pass.

    Args:
        positions: of each request, the token that is to be read; None where nothing is.
    """
    rows, before = {}, 0
    for part in batch:
        position = positions[part.request]
        if position is not None and part.start <= position < part.start + part.count:
            rows[part.request] = before + position - part.start
        before += part.count
    return rows


class Passes:
    """The passes of one worker."""

    def __init__(self, policy: str, layers: WatchedLayers) -> None:
        """For the policy of this sha256."""
        self._policy, self._layers = policy, layers
        self._marks: dict[str, Mark] = {}
        self._positions: dict[str, int | None] = {}
        self._asked: list[str] = []  # requests that the current pass reads, in the buffers' order
        self._kept: OrderedDict[str, tuple[Mark, dict[int, torch.Tensor]]] = OrderedDict()

    def admit(
        self, new: Iterable[tuple[str, Mapping[str, Any] | None, int]], finished: Iterable[str]
    ) -> None:
        """Take note of requests, by their ids, `extra_args` and tokens in the prompt.

        Raises:
            SafeguardError: one is not marked, or not of this policy. That ends the engine: it did
                not come through the guarded client.
        """
        for request in finished:
            self._marks.pop(request, None)
            self._positions.pop(request, None)
        for request, arguments, length in new:
            mark = Mark.of(arguments)
            if mark.policy != self._policy:
                raise SafeguardError(
                    f"A request of policy {mark.policy[:12]} came to workers of "
                    f"{self._policy[:12]}, so it is not answered."
                )
            self._marks[request] = mark
            last = mark.position == -1
            self._positions[request] = length - 1 if last else mark.position

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
            self._kept[mark.name] = (mark, self._layers.read(place))
            self._kept.move_to_end(mark.name)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
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
            shown = {str(n): x.float().cpu().numpy().tobytes() for n, x in states.items()}
            taken.append({"policy": mark.policy, "position": mark.position, "states": shown})
        return taken
