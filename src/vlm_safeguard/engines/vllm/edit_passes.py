"""What a worker edits in the passes that it makes, and the coordinates that it reads for edits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_safeguard.engines.vllm.edited_layers import EditedLayers
from vlm_safeguard.engines.vllm.passes import keep
from vlm_safeguard.engines.vllm.plain import to_bytes
from vlm_safeguard.engines.vllm.scheduled import Admitted, Scheduled, placed


@dataclass(frozen=True)
class Edited:
    """What was edited of one request.

    Attributes:
        positions: of its prompt's tokens.
        layers: of this worker, in which they were.
    """

    positions: set[int]
    layers: tuple[int, ...]


class EditPasses:
    """The passes of one worker."""

    def __init__(self, layers: EditedLayers) -> None:
        """Of these layers."""
        self._layers = layers
        self._admitted: dict[str, Admitted] = {}
        self._seen: OrderedDict[str, dict[int, torch.Tensor]] = OrderedDict()
        self._edited: OrderedDict[str, Edited] = OrderedDict()
        # of the current pass: a request, its tokens' places among those that are read, their rows
        self._read: list[tuple[Admitted, torch.Tensor, torch.Tensor]] = []
        self._planned: list[tuple[Admitted, Edited]] = []

    def admit(self, new: Iterable[Admitted], finished: Iterable[str]) -> None:
        """Take note of requests that come and go."""
        for request in finished:
            self._admitted.pop(request, None)
        for each in new:
            self._admitted[each.request] = each

    def begin(self, batch: Sequence[Scheduled]) -> None:
        """A pass over these comes next.

        Raises:
            SafeguardError: what is to be edited of it cannot be.
        """
        self._read, self._planned = [], []
        self._layers.begin()
        for row, part in placed(batch):
            about = self._admitted[part.request]
            self._plan_reading(about, part, row)
            self._plan_edit(about, part, row)
        if self._read:
            self._layers.look()

    def end(self) -> None:
        """The pass was made: keep what was read and edited.

        Raises:
            SafeguardError: it was not edited as planned.
        """
        self._layers.check()
        for about, places, rows in self._read:
            name, count = _name(about), len(about.mark.tokens)
            seen = self._seen.get(name) or self._layers.unseen(count)
            for number, coordinates in seen.items():
                coordinates[places] = self._layers.seen(number, rows)
            keep(self._seen, name, seen)
        for about, edited in self._planned:
            before = self._edited.get(_name(about), Edited(set(), edited.layers))
            positions = before.positions | edited.positions
            keep(self._edited, _name(about), Edited(positions, edited.layers))
        self._read, self._planned = [], []

    def take_seen(self, name: str) -> dict[str, bytes]:
        """Layer → the float32 coordinates that were read under this name, and are kept no longer.

        Empty where there are none.
        """
        return {str(n): to_bytes(x) for n, x in self._seen.pop(name, {}).items()}

    def take_edited(self, names: Iterable[str]) -> list[dict[str, Any] | None]:
        """What was edited under these names, and is kept no longer.

        Of each the positions in its prompt and the layers of this worker; None where nothing was.
        """
        return [
            None
            if (edited := self._edited.pop(name, None)) is None
            else {"positions": sorted(edited.positions), "layers": list(edited.layers)}
            for name in names
        ]

    def _plan_reading(self, about: Admitted, part: Scheduled, row: int) -> None:
        here = [
            (place, row + token - part.start)
            for place, token in enumerate(about.mark.tokens)
            if part.start <= token < part.start + part.count
        ]
        if here:
            places, rows = torch.tensor(here).unbind(1)
            self._read.append((about, places, rows))

    def _plan_edit(self, about: Admitted, part: Scheduled, row: int) -> None:
        plan = about.mark.edit
        if plan is None:
            return
        stop = part.start + part.count
        answer = part.tokens[about.prompt : stop]
        tokens, counterparts = plan.rows(part.start, part.count, about.prompt, answer)
        if not tokens:
            return
        chosen = torch.tensor(counterparts)
        rows, last = torch.tensor(tokens) + row, chosen == plan.last
        layers = tuple(number for number in self._layers.numbers if number in plan.layers)
        for number in layers:
            text = plan.coordinates_of(number, self._layers.rank)[chosen]
            self._layers.plan(number, rows, text, last)
        positions = {part.start + token for token in tokens}
        edited = Edited({each for each in positions if each < about.prompt}, layers)
        self._planned.append((about, edited))


def _name(about: Admitted) -> str:
    assert about.mark.name is not None, "what is read or edited has a name"
    return about.mark.name
