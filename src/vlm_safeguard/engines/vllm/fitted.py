"""What this engine needs of a guard."""

from __future__ import annotations

from typing import Protocol

from vlm_safeguard.model.fingerprint import EmbeddingSample, Fingerprint
from vlm_safeguard.policy.artifact import Provenance
from vlm_safeguard.policy.policy import Policy


class Fitted(Protocol):
    """A guard: see `Guard`."""

    @property
    def policy(self) -> Policy:
        """What is decided and done."""

    @property
    def provenance(self) -> Provenance:
        """What it was fitted on."""

    @property
    def fingerprint(self) -> Fingerprint | EmbeddingSample:
        """Of the model, to know it again by."""
