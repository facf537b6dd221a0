"""The text-only reading: what a policy decides by the texts, and what its edits aim at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.engines.hooks.layers import LayerHooks
from vlm_safeguard.engines.hooks.text_passes import Text, TextPasses, TextReadings
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.refusal import prefix_margins, read_opening
from vlm_safeguard.model.text_starts import TextStarts
from vlm_safeguard.policy.decision import decide
from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.discriminant import Discriminant
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.refusal import Opening
from vlm_safeguard.policy.subspace import Subspace


@dataclass(frozen=True, eq=False)
class TextReader:
    """Makes a policy's text-only passes.

    Attributes:
        hooks: of the layers, free when it is asked.
        directions: the policy's, on the model's device.
        discriminant: the policy's, likewise, if it has one.
        subspaces: by layer, likewise.
        readings: what is already read; None to read anew each time.
        starts: what texts begin with, as far as it is read.
    """

    policy: Policy
    backbone: Backbone
    hooks: LayerHooks
    directions: Directions
    subspaces: dict[int, Subspace]
    discriminant: Discriminant | None = None
    readings: TextReadings | None = None
    starts: TextStarts = field(default_factory=TextStarts)

    def ask(self, batch: Batch) -> None:
        """Decide on a batch by its texts, and take the coordinates that its edits aim at.

        Each different text of an editable request is read once, and each of its sentences; and
        behind these the words of a refusal, where the model's decision hangs on them or its answer
        may be edited there.

        Raises:
            SafeguardError: a state or a score is not finite, or a hook did not fire.
        """
        readings = TextReadings() if self.readings is None else self.readings
        asked = batch.editable.nonzero()[:, 0].tolist()
        judged = {text: self.policy.judged(text) for text in (batch.texts[i] for i in asked)}
        texts = dict.fromkeys([*judged, *chain(*judged.values())])
        place = {text: i for i, text in enumerate(texts)}
        passes = TextPasses(
            *(self.backbone, self.hooks, self.policy.watched, readings, self.starts),
            every_token=bool(self.subspaces),
        )
        starts = {self.policy.start(text) for text in judged}
        start = starts.pop() if len(starts) == 1 else ()
        passes.read(judged, start)
        passes.read_last((text for text in texts if text not in judged), start)
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
            opening = self._opening(list(place), final[:, 0], own.tokens, passes)
            batch.refusals = dict(zip(place, opening.likeliest, strict=True))
            reading = replace(reading, margin=opening.margin, prefix_margin=opening.margin)
            alone = [text not in judged for text in place]
            declined = own.awaits_words(reading, alone).nonzero()[:, 0].tolist()
            words = self._words(list(place), declined, opening, passes)
            reading = replace(reading, prefix_margin=words)
        rows = [
            [place[each] for each in judged[text]] if editable else []
            for text, editable in zip(batch.texts, batch.editable.tolist(), strict=True)
        ]
        decision = decide(self.policy.gate, "text", rows, reading, len(self.policy.layers))
        batch.decision = batch.decision.merged(decision)
        self._take_coordinates(batch, passes)
        if not self.policy.edits:
            batch.read_texts = passes.whole  # which the answers go on from

    def _opening(
        self,
        texts: list[Text],
        final: torch.Tensor,
        tokens: tuple[int, ...],
        passes: TextPasses,
    ) -> Opening:
        """How answers would begin, off the logits that they begin with where these are needed."""
        whole, prefixes = passes.whole, self.policy.prefixes
        if self.policy.edits or whole is None:
            return read_opening(self.backbone, final, tokens, prefixes)
        known = [text for text in texts if text in whole.rows]
        if not known or known != texts[: len(known)]:
            return read_opening(self.backbone, final, tokens, prefixes)
        opening = Opening.of(whole.logits[whole.places(known)], tokens, prefixes)
        if len(known) == len(texts):
            return opening
        rest = read_opening(self.backbone, final[len(known) :], tokens, prefixes)
        return Opening.joined([opening, rest])

    def _words(
        self, texts: list[Text], declined: list[int], opening: Opening, passes: TextPasses
    ) -> torch.Tensor:
        """`prefix_margins` along the prefix that each of the `declined` texts begins.

        They alone are read; elsewhere it is the lead of a refusal's first token.
        """
        margin = opening.margin
        words = margin.clone()
        for prefix in filter(None, dict.fromkeys(opening.begun[i] for i in declined)):
            mine = [i for i in declined if opening.begun[i] == prefix]
            passes.read_behind([texts[i] for i in mine], prefix)
            behind = torch.stack([passes.readings.final[texts[i] + prefix] for i in mine])
            check_finite([behind], "The text-only pass gave states that are")
            words[mine] = prefix_margins(self.backbone, behind, prefix, margin[mine])
        return words

    def _take_coordinates(self, batch: Batch, passes: TextPasses) -> None:
        """Of the texts whose requests are edited, or may be yet; zeros of the others."""
        if not self.subspaces:
            return
        prefix, behind = self.policy.refusal_prefix, self.policy.followed
        edited = batch.decision.is_open.any(1)
        if batch.decision.awaits_image:
            edited = edited | batch.editable
        needed = dict.fromkeys(batch.texts[i] for i in edited.nonzero()[:, 0].tolist())
        passes.read_behind(needed, behind)
        states = passes.readings.states
        for layer, subspace in self.subspaces.items():
            V = subspace.V
            batch.coordinates[layer] = torch.cat(
                [
                    self._coordinates(states[text + behind][layer], V, len(text + prefix))
                    if text in needed
                    else V.new_zeros(len(text + prefix), len(V))
                    for text in dict.fromkeys(batch.texts)  # in the order that rows count tokens in
                ]
            )

    @staticmethod
    def _coordinates(states: torch.Tensor, V: torch.Tensor, length: int) -> torch.Tensor:
        coordinates = states.to(V.dtype) @ V.mT
        return torch.nn.functional.pad(coordinates, (0, 0, 0, length - len(coordinates)))


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
