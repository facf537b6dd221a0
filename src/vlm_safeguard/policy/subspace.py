"""The safety subspace of one layer, put where an engine computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_safeguard.policy.edits import Reference


@dataclass(frozen=True, eq=False)
class Subspace:
    """What an edit of one layer works with.

    Attributes:
        V: (m, hidden) orthonormal rows.
        harmful: (m,) coordinates of the harmful anchors' mean.
        drift: (m,) those of the mean shift by a blank image.
    """

    V: torch.Tensor
    harmful: torch.Tensor
    drift: torch.Tensor

    def to(self, device: torch.device) -> Subspace:
        """The same on another device."""
        return Subspace(self.V.to(device), self.harmful.to(device), self.drift.to(device))

    def reference(self, text: torch.Tensor | None, last: torch.Tensor) -> Reference:
        """What some tokens' states are edited towards.

        Args:
            text: (n, m) coordinates of their counterparts in the text-only pass; None where it was
                not run.
            last: (n,) bool: those that are edited as a prompt's last token is. Other ones are not
                raised to the harmful anchors' mean, which was not measured there.
        """
        harmful = self.harmful
        if text is not None:
            harmful = torch.where(last[:, None], harmful, text)
        return Reference(text=text, harmful=harmful, drift=self.drift)
