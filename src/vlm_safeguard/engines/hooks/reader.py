"""The text-only pass: requests without their images, through the model's own decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.refusal import prefix_margins, refusal_margins
from vlm_safeguard.policy.decision import decide
from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.subspace import Subspace

Text = tuple[int, ...]


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


@dataclass(frozen=True, eq=False)
class TextReader:
    """Makes a policy's text-only passes.

    Attributes:
        hooks: of the layers, free when it is asked.
        directions: the policy's, on the model's device.
        subspaces: by layer, likewise.
        readings: what is already read; None to read anew each time.
    """

    policy: Policy
    backbone: Backbone
    hooks: LayerHooks
    directions: Directions
    subspaces: dict[int, Subspace]
    readings: TextReadings | None = None

    def ask(self, batch: Batch) -> None:
        """Decide on a batch by its texts, and take the coordinates that its edits aim at.

        Each different text of an editable request is read once; once more, with the words of a
        refusal behind it, where its first token refuses or its answer may be edited there.

        Raises:
            SafeguardError: a state or a score is not finite, or a hook did not fire.
        """
        readings = TextReadings() if self.readings is None else self.readings
        asked = batch.editable.nonzero()[:, 0].tolist()
        place = {text: i for i, text in enumerate(dict.fromkeys(batch.texts[i] for i in asked))}
        self._read(list(place), (), readings)
        final = torch.stack([readings.final[text] for text in place])
        states = {
            layer: torch.stack([readings.states[text][layer][-1] for text in place])
            for layer in self.policy.watched
        }
        check_finite([final, *states.values()], "The text-only pass gave states that are")
        margin = words = None
        if tokens := self.policy.refusal_tokens:
            margin = refusal_margins(self.backbone, final[:, 0], tokens)
            words = self._words(list(place), margin, readings)
        reading = Reading(states, self.directions, self.policy.layers, margin, words)
        rows = [
            place[text] if editable else None
            for text, editable in zip(batch.texts, batch.editable.tolist(), strict=True)
        ]
        decision = decide(self.policy.gate, "text", rows, reading, len(self.policy.layers))
        batch.decision = batch.decision.merged(decision)
        self._take_coordinates(batch, readings)

    def _words(
        self, texts: list[Text], margin: torch.Tensor, readings: TextReadings
    ) -> torch.Tensor:
        """`prefix_margins`, read behind those texts alone whose first token refuses."""
        prefix, words = self.policy.refusal_prefix, margin.clone()
        declined = (margin > 0).nonzero()[:, 0].tolist()
        if not prefix or not declined:
            return words
        self._read([texts[i] for i in declined], prefix, readings)
        final = torch.stack([readings.final[texts[i] + prefix] for i in declined])
        check_finite([final], "The text-only pass gave states that are")
        words[declined] = prefix_margins(self.backbone, final, prefix, margin[declined])
        return words

    def _take_coordinates(self, batch: Batch, readings: TextReadings) -> None:
        """Of the texts whose requests are edited, or may be yet; zeros of the others."""
        if not self.subspaces:
            return
        prefix = self.policy.refusal_prefix
        behind = prefix if self.policy.follows_refusals else ()
        edited = batch.decision.is_open.any(1)
        if batch.decision.awaits_image:
            edited = edited | batch.editable
        needed = dict.fromkeys(batch.texts[i] for i in edited.nonzero()[:, 0].tolist())
        self._read(list(needed), behind, readings)
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

    def _read(self, texts: list[Text], prefix: Text, readings: TextReadings) -> None:
        """One pass of those texts that are not read yet, with the prefix behind each."""
        missing = readings.missing([text + prefix for text in texts], self.policy.watched)
        if not missing:
            return
        states: dict[int, torch.Tensor] = {}

        def keep(layer: int, hidden: torch.Tensor) -> None:
            states[layer] = hidden.clone()  # or later layers may write to it

        self.hooks.arm(self.policy.watched, keep)
        try:
            bare = [read[: len(read) - len(prefix)] for read in missing]
            final = self.backbone.run_text(bare, prefix)
            self.hooks.check_all_took_part(self.policy.watched, "the text-only pass")
        finally:
            self.hooks.disarm()
        for row, read in enumerate(missing):
            readings.final[read] = final[row]
            readings.states[read] = {
                layer: values[row, -len(read) :] for layer, values in states.items()
            }


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
