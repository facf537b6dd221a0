"""How far a model may be from the one that a guard was fitted on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Tolerances(BaseModel):
    """Relative errors of norms: 0 where nothing differs, 1 where nothing is alike.

    Measured on the Pocket VLM (`python benchmarks/tolerances.py`): the largest error of a weight,
    that of the harm scores and that of the logits.

    | the same weights        | weight | scores | logits |
    |-------------------------|--------|--------|--------|
    | float16                 | 0.03 % | 0.001  | 0.001  |
    | bfloat16                | 0.22 % | 0.011  | 0.017  |
    | packed, 8 bits          |        | 0.033  | 0.027  |
    | packed, 4 bits          |        | 0.36   | 0.24   |

    | other weights           | weight | scores | logits |
    |-------------------------|--------|--------|--------|
    | merged LoRA of 1 %      | 1.4 %  | 0.043  | 0.019  |
    | abliterated, one layer  | 4.6 %  | 0.092  | 0.027  |
    | abliterated             | 6.8 %  | 1.75   | 0.50   |
    | abliterated, packed     |        | 1.74   | 0.50   |
    | drawn anew              | 179 %  | 1.17   | 1.10   |

    So weights are told apart with room on both sides (0.22 % and 1.4 %, limit 0.5 %). Packed ones
    are by behaviour alone: four bits and a whole abliteration (0.36 and 1.74, limit 0.5), but not a
    merged LoRA or an edit of one layer, which move it less than four bits do. Abliterated is one
    harmful direction taken out of every `o_proj` and `down_proj`; LoRA of rank 8 in every `q_proj`
    and `v_proj`, 1 % of their norm.

    Attributes:
        weights: of a weight's entries. bfloat16 moves an entry by 2⁻⁸ of itself at most; taking
            one direction out of a matrix of width d moves its entries by about 1/√d of themselves.
        entry: what an entry may be off by beside that; by default half of float16's smallest step.
        scores: of a few anchors' harm scores.
        logits: of their likeliest next tokens' logits, less each anchor's mean.
        packed_scores: `scores` where weights are packed (quantized), so that they cannot be
            compared; `packed_logits` likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: float = Field(default=0.005, gt=0)
    entry: float = Field(default=2.0**-24, gt=0)
    scores: float = Field(default=0.1, gt=0)
    logits: float = Field(default=0.1, gt=0)
    packed_scores: float = Field(default=0.5, gt=0)
    packed_logits: float = Field(default=0.4, gt=0)
