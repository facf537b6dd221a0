"""The text-only pass: requests without their images, through the model's own decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.refusal import prefix_margins, refusal_margins
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.policy.decision import decide
from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.discriminant import Discriminant
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.refusal import first_token_margin
from vlm_safeguard.policy.subspace import Subspace

Text = tuple[int, ...]
T = TypeVar("T")


@dataclass
class TextReadings:
    """Text-only passes that are already made, for guards of one model that read the same prompts.

    Attributes:
        states: token ids → layer → (tokens, hidden) states.
        final: likewise → (1 + prefix, hidden) final states of the text's last token and, where it
            was read, of the refusal prefix behind it, from which the next ones are predicted.
    """

    states: dict[Text, dict[int, torch.Tensor]] = field(default_factory=dict)
    final: dict[Text, torch.Tensor] = field(default_factory=dict)

    def missing(self, texts: Iterable[Text], layers: Iterable[int]) -> list[Text]:
        """Those of `texts` that are not read at all `layers`."""
        needed = set(layers)
        return [text for text in texts if not needed <= self.states.get(text, {}).keys()]

    def clear(self) -> None:
        """Forget all of them."""
        self.states.clear()
        self.final.clear()


@dataclass(frozen=True, eq=False)
class TextReader:
    """Makes a policy's text-only passes.

    Attributes:
        hooks: of the layers, free when it is asked.
        directions: the policy's, on the model's device.
        discriminant: the policy's, likewise, if it has one.
        subspaces: by layer, likewise.
        readings: what is already read; None to read anew each time.
    """

    policy: Policy
    backbone: Backbone
    hooks: LayerHooks
    directions: Directions
    subspaces: dict[int, Subspace]
    discriminant: Discriminant | None = None
    readings: TextReadings | None = None

    def ask(self, batch: Batch) -> None:
        """Decide on a batch by its texts, and take the coordinates that its edits aim at.

        Each different text of an editable request is read once; and behind it the words of a
        refusal, where the model's decision hangs on them or its answer may be edited there.

        Raises:
            SafeguardError: a state or a score is not finite, or a hook did not fire.
        """
        readings = TextReadings() if self.readings is None else self.readings
        asked = batch.editable.nonzero()[:, 0].tolist()
        place = {text: i for i, text in enumerate(dict.fromkeys(batch.texts[i] for i in asked))}
        first = self._read(list(place), readings)
        final = torch.stack([readings.final[text] for text in place])
        states = {
            layer: torch.stack([readings.states[text][layer][-1] for text in place])
            for layer in self.policy.watched
        }
        check_finite([final, *states.values()], "The text-only pass gave states that are")
        reading = Reading(
            states, self.directions, self.policy.layers, discriminant=self.discriminant
        )
        if (own := self.policy.own_refusal) is not None:
            margin = self._margins(list(place), final[:, 0], own.tokens, first)
            reading = replace(reading, margin=margin, prefix_margin=margin)
            declined = own.awaits_words(reading).nonzero()[:, 0].tolist()
            words = self._words(list(place), declined, margin, readings, first)
            reading = replace(reading, prefix_margin=words)
        rows = [
            place[text] if editable else None
            for text, editable in zip(batch.texts, batch.editable.tolist(), strict=True)
        ]
        decision = decide(self.policy.gate, "text", rows, reading, len(self.policy.layers))
        batch.decision = batch.decision.merged(decision)
        self._take_coordinates(batch, readings, first)
        if not self.policy.edits:
            batch.read_texts = first  # which the answers go on from

    def _margins(
        self,
        texts: list[Text],
        final: torch.Tensor,
        tokens: tuple[int, ...],
        first: TextPass | None,
    ) -> torch.Tensor:
        """`refusal_margins`, off the logits that answers begin with where these will be needed."""
        if self.policy.edits or first is None or not first.holds(texts):
            return refusal_margins(self.backbone, final, tokens)
        return first_token_margin(first.logits[first.places(texts)], tokens).cpu()

    def _words(
        self,
        texts: list[Text],
        declined: list[int],
        margin: torch.Tensor,
        readings: TextReadings,
        first: TextPass | None,
    ) -> torch.Tensor:
        """`prefix_margins`, read behind the `declined` of the texts alone; `margin` elsewhere."""
        prefix, words = self.policy.refusal_prefix, margin.clone()
        if not prefix or not declined:
            return words
        self._read_behind([texts[i] for i in declined], prefix, readings, first)
        final = torch.stack([readings.final[texts[i] + prefix] for i in declined])
        check_finite([final], "The text-only pass gave states that are")
        words[declined] = prefix_margins(self.backbone, final, prefix, margin[declined])
        return words

    def _take_coordinates(
        self, batch: Batch, readings: TextReadings, first: TextPass | None
    ) -> None:
        """Of the texts whose requests are edited, or may be yet; zeros of the others."""
        if not self.subspaces:
            return
        prefix = self.policy.refusal_prefix
        behind = prefix if self.policy.follows_refusals else ()
        edited = batch.decision.is_open.any(1)
        if batch.decision.awaits_image:
            edited = edited | batch.editable
        needed = dict.fromkeys(batch.texts[i] for i in edited.nonzero()[:, 0].tolist())
        self._read_behind(list(needed), behind, readings, first)
        for layer, subspace in self.subspaces.items():
            V = subspace.V
            batch.coordinates[layer] = torch.cat(
                [
                    self._coordinates(readings.states[text + behind][layer], V, len(text + prefix))
                    if text in needed
                    else V.new_zeros(len(text + prefix), len(V))
                    for text in dict.fromkeys(batch.texts)  # in the order that rows count tokens in
                ]
            )

    @staticmethod
    def _coordinates(states: torch.Tensor, V: torch.Tensor, length: int) -> torch.Tensor:
        coordinates = states.to(V.dtype) @ V.mT
        return torch.nn.functional.pad(coordinates, (0, 0, 0, length - len(coordinates)))

    def _read(self, texts: list[Text], readings: TextReadings) -> TextPass | None:
        """One pass of those texts that are not read yet; None where all are."""
        missing = readings.missing(texts, self.policy.watched)
        if not missing:
            return None
        states, read = self._watch(lambda: self.backbone.read_texts(missing))
        for row, text in enumerate(missing):
            readings.final[text] = read.final[row, None]
            readings.states[text] = {n: rows[row, -len(text) :] for n, rows in states.items()}
        return read

    def _read_behind(
        self, texts: list[Text], prefix: Text, readings: TextReadings, first: TextPass | None
    ) -> None:
        """One pass of a prefix behind those texts where it is not read yet.

        Args:
            first: a pass that it goes on from, if it holds them; else they are read again.
        """
        whole = readings.missing([text + prefix for text in texts], self.policy.watched)
        missing = [text[: len(text) - len(prefix)] for text in whole]
        if not missing:
            return
        if first is not None and first.holds(missing):
            states, final = self._watch(lambda: self.backbone.go_on(first, missing, prefix))
        else:
            states, final = self._watch(lambda: self.backbone.run_text(missing, prefix)[:, 1:])
        for row, text in enumerate(missing):
            readings.final[text + prefix] = torch.cat([readings.final[text], final[row]])
            readings.states[text + prefix] = {
                n: torch.cat([readings.states[text][n], rows[row, -len(prefix) :]])
                for n, rows in states.items()
            }

    def _watch(self, run: Callable[[], T]) -> tuple[dict[int, torch.Tensor], T]:
        """What a pass gives, and the states of the watched layers in it."""
        states: dict[int, torch.Tensor] = {}

        def keep(layer: int, hidden: torch.Tensor) -> None:
            states[layer] = hidden.clone()  # or later layers may write to it

        self.hooks.arm(self.policy.watched, keep)
        try:
            given = run()
            self.hooks.check_all_took_part(self.policy.watched, "the text-only pass")
        finally:
            self.hooks.disarm()
        return states, given


def check_finite(tensors: list[torch.Tensor], what: str) -> None:
    """Refuse values that are not finite, asking the device once.

    Raises:
        SafeguardError: that begins with `what`.
    """
    device = tensors[0].device
    if not bool(torch.stack([torch.isfinite(x).all().to(device) for x in tensors]).all()):
        raise SafeguardError(
            f"{what} not finite; the request cannot be judged, so nothing is generated."
        )
