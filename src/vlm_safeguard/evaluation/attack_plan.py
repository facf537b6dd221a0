"""A plan's `attack:` block: which attacks, on what, and their budgets."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vlm_safeguard.evaluation.plan_fields import BenchmarkName, Condition, Part


class SuffixPlan(Part):
    """How long a suffix is searched for."""

    tokens: int = Field(default=10, ge=1, description="Of the suffix.")
    steps: int = Field(default=20, ge=1, description="Gradients, a swap of one token each.")
    candidates: int = Field(default=64, ge=1, description="Swaps that are tried in each step.")
    top_k: int = Field(default=64, ge=1, description="Tokens that are drawn from, a place.")


class AttackPlan(Part):
    """Attacks that know the defence, on every defence of the plan alike.

    Beside them each defence is asked the same requests without an image, and beside the image as it
    is. The answers are judged by the plan's judges, and have its length.
    """

    attacks: tuple[Literal["pgd", "universal", "prefill", "suffix"], ...] = Field(
        ("pgd", "universal", "prefill", "suffix"),
        min_length=1,
        description="pgd: an image for each request; universal: one for all, made for others; "
        "prefill: the answer is begun; suffix: words behind the request (GCG).",
    )
    benchmark: BenchmarkName = Field("development", description="Harmful requests.")
    requests: int = Field(50, ge=1, description="How many are attacked, drawn by the seed.")
    seed: int = Field(0, description="Draws requests, random starts and swaps.")
    conditions: tuple[Condition, ...] = Field(
        ("noise",), min_length=1, description="Images that attacks on the pixels start from."
    )
    epsilon: tuple[Annotated[int, Field(ge=1, le=255)], ...] = Field(
        (8, 16, 32, 255),
        min_length=1,
        description="By how many of 255 levels a pixel may differ; 255 is unbounded.",
    )
    steps: int = Field(200, ge=1, description="Gradients on the pixels in each restart.")
    step: int = Field(8, ge=1, le=255, description="Levels of the first step; it shrinks to 1.")
    restarts: int = Field(3, ge=1, description="The first from the image, others at random.")
    confidence: float = Field(
        10.0, ge=0, description="Logits below zero at which a request is attacked no further."
    )
    universal_prompts: int = Field(
        25, ge=1, description="Other requests, that the universal image is made for."
    )
    suffix: SuffixPlan = SuffixPlan()
    batch_size: int = Field(25, ge=1, description="Requests that are attacked at once.")

    @model_validator(mode="after")
    def _has_images(self) -> Self:
        if "text" in self.conditions:
            raise ValueError("'text' shows no image to attack; it is asked in any case")
        return self
