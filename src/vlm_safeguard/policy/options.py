"""What may be chosen at fitting: every number that decides and is not measured."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_safeguard.errors import SafeguardError

Share = Annotated[float, Field(ge=0, le=1)]


class FitOptions(BaseModel):
    """Kept in a guard's provenance.

    Attributes:
        rank: directions a layer, m; fewer where there are fewer anchors. Development prompts lost
            more with 32 than with 64.
        stored_rank: directions kept in the artifact at least, to choose a smaller rank from.
        budget: share of harmless requests that may open the gate though the model would answer
            them.
        further_budget: the same of those in jailbreaks' wrappers, in other languages and as second
            turns, for a discriminant; `budget` where that is more.
        first_layer: the first edited layer, as a share of the depth; `last_layer` likewise. See
            `choose_layers` for what was measured.
        folds: of the anchors, whose scores are taken under what was fitted on the other folds; for
            a discriminant of the calibration requests, too.
        near_best: by how much a layer's held-out AUROC may be below the best for the gate to read
            it.
        legible: held-out AUROC from which a layer before the edit is worth reading.
        drift_pairs: anchors whose shift under a blank image is measured.
        refusal_likelier: difference of mean probabilities between harmful and harmless anchors that
            makes a first token a refusal's.
        refusal_contrast: by how much more of the harmful anchors than of the calibration requests a
            model must refuse for its own decision to count.
        refusal_anchors: refused anchors whose answers' openings are compared, at most.
        beginning_tokens: tokens that nearly all of a model's answers begin with, at most, where its
            refusals cannot be told by the first.
        beginning_share: of the answers that have to begin alike for that.
        wrappings: jailbreaks' wrappers that each anchor is put in for the discriminant.
        sentences: parts of a request that a discriminant's gate judges by themselves, at most; 0
            for none.
        sentence_tokens: of such a part, at least.
        shrinkages: shares δ that the discriminant's is chosen from.
        prefix_tokens: tokens of the refusal prefix, at most ("I'm sorry, but I can't assist with
            that." has twelve).
        prefix_fence: interquartile ranges below the first quartile of the margins with which the
            model says the prefix to the anchors; what lags further behind is far out (Tukey 1977)
            and not said in about those words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=64, ge=1)
    stored_rank: int = Field(default=8, ge=1)
    budget: float = Field(default=0.01, gt=0, lt=1)
    further_budget: Share = 0.03
    first_layer: Share = 0.27
    last_layer: Share = 0.9
    folds: int = Field(default=5, ge=2, le=20)
    near_best: Share = 0.02
    legible: float = 0.9
    drift_pairs: int = Field(default=32, ge=1)
    refusal_likelier: Share = 0.05
    refusal_contrast: Share = 0.5
    refusal_anchors: int = Field(default=64, ge=1)
    beginning_tokens: int = Field(default=8, ge=0)
    beginning_share: Share = 0.9
    wrappings: int = Field(default=2, ge=0)
    sentences: int = Field(default=16, ge=0)
    sentence_tokens: int = Field(default=4, ge=1)
    shrinkages: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.03, 0.1, 0.3, 0.6, 0.9)
    prefix_tokens: int = Field(default=12, ge=0)
    prefix_fence: float = Field(default=3.0, ge=0)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Options by name, the others as they are by default.

        Raises:
            SafeguardError: which cannot be, and why.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise SafeguardError(
                f"The fit option {name} cannot be {first['input']!r}: {first['msg'].lower()}."
            ) from error
