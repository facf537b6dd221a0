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
        states: text and refusal prefix → layer → (tokens, hidden) states.
        final: likewise → (1 + prefix, hidden) final states of the text's last token and the
            prefix's, from which the next ones are predicted.
    """

    states: dict[Text, dict[int, torch.Tensor]] = field(default_factory=dict)
    final: dict[Text, torch.Tensor] = field(default_factory=dict)

    def missing(self, texts: Iterable[Text], prefix: Text, layers: Iterable[int]) -> list[Text]:
        """Those of `texts` that are not read, with the prefix behind them, at all `layers`."""
        needed = set(layers)
        return [text for text in texts if not needed <= self.states.get(text + prefix, {}).keys()]


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

        Each different text of an editable request is read once.

        Raises:
            SafeguardError: a state or a score is not finite, or a hook did not fire.
        """
        prefix, window = self.policy.refusal_prefix, self.policy.layers
        asked = batch.editable.nonzero()[:, 0].tolist()
        place = {text: i for i, text in enumerate(dict.fromkeys(batch.texts[i] for i in asked))}
        readings = TextReadings() if self.readings is None else self.readings
        if unread := readings.missing(place, prefix, self.policy.watched):
            self._read(unread, readings)
        final = torch.stack([readings.final[text + prefix] for text in place])  # text, prefix
        states = {
            layer: torch.stack(
                [readings.states[text + prefix][layer][len(text) - 1] for text in place]
            )
            for layer in self.policy.watched
        }
        check_finite([final, *states.values()], "The text-only pass gave states that are")
        different = dict.fromkeys(batch.texts)  # in the order that rows count tokens in
        for layer, subspace in self.subspaces.items():
            V = subspace.V
            batch.coordinates[layer] = torch.cat(
                [
                    readings.states[text + prefix][layer].to(V.dtype) @ V.mT
                    if text in place
                    else V.new_zeros(len(text + prefix), len(V))
                    for text in different
                ]
            )
        margin = words = None
        if tokens := self.policy.refusal_tokens:
            margin = refusal_margins(self.backbone, final[:, 0], tokens)
            words = prefix_margins(self.backbone, final, prefix, margin)
        reading = Reading(states, self.directions, window, margin, words)
        rows = [
            place[text] if editable else None
            for text, editable in zip(batch.texts, batch.editable.tolist(), strict=True)
        ]
        decision = decide(self.policy.gate, "text", rows, reading, len(window))
        batch.decision = batch.decision.merged(decision)

    def _read(self, texts: list[Text], readings: TextReadings) -> None:
        """One pass of texts, and the refusal prefix behind each."""
        prefix = self.policy.refusal_prefix
        states: dict[int, torch.Tensor] = {}

        def keep(layer: int, hidden: torch.Tensor) -> None:
            states[layer] = hidden.clone()  # or later layers may write to it

        self.hooks.arm(self.policy.watched, keep)
        try:
            final = self.backbone.run_text(texts, prefix)
            self.hooks.check_all_took_part(self.policy.watched, "the text-only pass")
        finally:
            self.hooks.disarm()
        for row, text in enumerate(texts):
            read = text + prefix
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
