"""The passes over requests' texts, without their images, and what they gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.model.text_starts import TextStarts

Text = tuple[int, ...]
T = TypeVar("T")
_ROWS = 32  # texts in one pass


@dataclass
class TextReadings:
    """Text-only passes that are already made, for guards of one model that read the same prompts.

    Attributes:
        states: token ids → layer → (tokens, hidden) states: of all tokens, or of the last one.
        final: likewise → (1 + prefix, hidden) final states of the text's last token and, where it
            was read, of the refusal prefix behind it, from which the next ones are predicted.
    """

    states: dict[Text, dict[int, torch.Tensor]] = field(default_factory=dict)
    final: dict[Text, torch.Tensor] = field(default_factory=dict)

    def missing(
        self, texts: Iterable[Text], layers: Iterable[int], *, every_token: bool
    ) -> list[Text]:
        """Those of `texts` that are not read at all `layers`, or not every token of them."""
        needed = set(layers)

        def lacks(text: Text) -> bool:
            read = self.states.get(text, {})
            short = every_token and any(len(states) < len(text) for states in read.values())
            return short or not needed <= read.keys()

        return [text for text in texts if lacks(text)]

    def clear(self) -> None:
        """Forget all of them."""
        self.states.clear()
        self.final.clear()


@dataclass(eq=False)
class TextPasses:
    """Those over one batch's texts: over the texts whole, then over what may stand behind them.

    Attributes:
        hooks: of the layers, free when a pass is made.
        layers: whose states are kept.
        readings: what is already read, and what these passes add to it.
        starts: likewise, of what texts begin with.
        every_token: whether the states of all tokens are kept, which edits aim at.
        whole: the pass over texts, from which others go on; None where all were already read.
    """

    backbone: Backbone
    hooks: LayerHooks
    layers: tuple[int, ...]
    readings: TextReadings
    starts: TextStarts
    every_token: bool
    whole: TextPass | None = None

    def read(self, texts: Iterable[Text], start: Text) -> None:
        """One pass over those texts that are not read yet.

        Args:
            start: what all begin with, which is read once for many passes; it may be empty. Where
                the states of all tokens are kept, texts are read whole.

        Raises:
            SafeguardError: a hook did not fire.
        """
        missing = self._missing(texts)
        if not missing:
            return
        begun = None if self.every_token else self._read_start(start, missing)
        states, whole = self._watch(lambda: self.backbone.read_texts(missing, begun))
        self.whole = whole
        for row, text in enumerate(missing):
            self.readings.final[text] = whole.final[row, None]
            self.readings.states[text] = {n: rows[row, -len(text) :] for n, rows in states.items()}

    def read_last(self, texts: Iterable[Text], start: Text) -> None:
        """Passes over texts that are not read yet, of each of which its last token is kept.

        Args:
            start: see `read`.

        Raises:
            SafeguardError: a hook did not fire.
        """
        missing = self.readings.missing(texts, self.layers, every_token=False)
        missing.sort(key=len)  # so that a pass pads little
        begun = self._read_start(start, missing)
        for first in range(0, len(missing), _ROWS):
            part = missing[first : first + _ROWS]
            states, final = self._watch(partial(self.backbone.run_text, part, start=begun))
            for row, text in enumerate(part):
                self.readings.final[text] = final[row]
                self.readings.states[text] = {n: rows[row, -1:] for n, rows in states.items()}

    def read_behind(self, texts: Iterable[Text], prefix: Text) -> None:
        """One pass over a prefix behind those texts where it is not read yet.

        It goes on from the whole texts' pass if that holds them; else they are read again.

        Raises:
            SafeguardError: a hook did not fire.
        """
        readings = self.readings
        longer = self._missing([text + prefix for text in texts])
        missing = [text[: len(text) - len(prefix)] for text in longer]
        if not missing:
            return
        states, final = self._watch(lambda: self.backbone.go_on(self.whole, missing, prefix))
        for row, text in enumerate(missing):
            readings.final[text + prefix] = torch.cat([readings.final[text], final[row]])
            readings.states[text + prefix] = {
                n: torch.cat([readings.states[text][n], rows[row, -len(prefix) :]])
                for n, rows in states.items()
            }

    def _read_start(self, start: Text, texts: list[Text]) -> TextPass | None:
        """The pass that texts go on from; None where they are read whole."""
        if not start or not texts:
            return None
        self.hooks.arm()
        try:
            return self.starts.of(self.backbone, start, max(map(len, texts)))
        finally:
            self.hooks.disarm()

    def _missing(self, texts: Iterable[Text]) -> list[Text]:
        return self.readings.missing(texts, self.layers, every_token=self.every_token)

    def _watch(self, run: Callable[[], T]) -> tuple[dict[int, torch.Tensor], T]:
        """The states of the watched layers in a pass, and what it gives."""
        states: dict[int, torch.Tensor] = {}

        def keep(layer: int, hidden: torch.Tensor) -> None:
            kept = hidden if self.every_token else hidden[:, -1:]
            states[layer] = kept.clone()  # or later layers may write to it

        self.hooks.arm(self.layers, keep)
        try:
            given = run()
            self.hooks.check_all_took_part(self.layers, "the text-only pass")
        finally:
            self.hooks.disarm()
        return states, given
