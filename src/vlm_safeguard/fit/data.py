"""What a guard is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_safeguard.anchors import Anchor


@dataclass(frozen=True)
class FitData:
    """What a guard is fitted on: anchor pairs, and harmless requests that choose its thresholds."""

    anchors: Sequence[Anchor]
    calibration: Sequence[str]

    @property
    def harmful(self) -> list[str]:
        """The harmful anchors' texts."""
        return [anchor.harmful for anchor in self.anchors]

    @property
    def requests(self) -> list[str]:
        """All texts: harmful anchors, harmless ones, calibration requests."""
        return [*self.harmful, *(a.harmless for a in self.anchors), *self.calibration]
