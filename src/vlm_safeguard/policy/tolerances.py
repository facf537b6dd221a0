"""How far a model may be from the one that a guard was fitted on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Tolerances(BaseModel):
    """Relative errors of norms: 0 where nothing differs, 1 where nothing is alike.

    Measured on the Pocket VLM: its scores are off by 0.01 in bfloat16, 0.03 with 8-bit weights and
    0.33 with 4-bit ones (NF4, blocks of 64); by 1.1 and more with one harmful direction taken out
    of its layers (abliterated). Its logits by 0.02, 0.03, 0.26; and 0.48.

    Attributes:
        weights: of a parameter's entries. bfloat16 moves an entry by 2⁻⁸ of itself at most; taking
            one direction out of a matrix of width d moves its entries by about 1/√d of themselves.
        scores: of a few anchors' harm scores.
        logits: of their likeliest next tokens' logits, less each anchor's mean.
        packed_scores: `scores` where weights are packed (quantized), so that they cannot be
            compared; `packed_logits` likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: float = Field(default=0.005, gt=0)
    scores: float = Field(default=0.1, gt=0)
    logits: float = Field(default=0.1, gt=0)
    packed_scores: float = Field(default=0.5, gt=0)
    packed_logits: float = Field(default=0.4, gt=0)
