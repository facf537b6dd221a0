"""What a pass shows of some requests: all that a gate's criteria may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vlm_safeguard.policy.directions import Directions
from vlm_safeguard.policy.discriminant import Discriminant


@dataclass(frozen=True)
class Reading:
    """Of n requests, in one pass: the text-only one, or the multimodal one.

    Attributes:
        states: layer → (n, hidden) states of the last prompt token.
        directions: on the states' device.
        window: the layers that are edited.
        margin: (n,) lead of a refusal's first token, as `refusal.first_token_margin` gives it, on
            the CPU; None where no criterion asks for it.
        prefix_margin: (n,) the least lead of the tokens (`refusal.token_margin`) of the prefix that
            the refusal begins; `margin` where no criterion asks for it.
        discriminant: on the states' device; None where no criterion asks for it.
    """

    states: Mapping[int, torch.Tensor]
    directions: Directions
    window: tuple[int, ...]
    margin: torch.Tensor | None = None
    prefix_margin: torch.Tensor | None = None
    discriminant: Discriminant | None = None
    _harm: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)
    _discriminated: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)

    def harm(self, layers: tuple[int, ...]) -> torch.Tensor:
        """(n,) harm score, `Directions.harm_score`, averaged over these layers."""
        if layers not in self._harm:  # criteria share it
            scores = [self.directions.harm_score(self.states[layer], layer) for layer in layers]
            self._harm[layers] = torch.stack(scores).mean(0)
        return self._harm[layers]

    def discriminant_score(self, layers: tuple[int, ...]) -> torch.Tensor:
        """(n,) score under the discriminant, averaged over these layers."""
        assert self.discriminant is not None
        if layers not in self._discriminated:  # criteria share it
            scores = [self.discriminant.score(self.states[layer], layer) for layer in layers]
            self._discriminated[layers] = torch.stack(scores).mean(0)
        return self._discriminated[layers]
