"""Utility: whether an answer is right."""

from __future__ import annotations

from vlm_safeguard.evaluation.asks.samples import Sample
from vlm_safeguard.pocket.scenes import names_only


def names_answer(sample: Sample, reply: str) -> bool:
    """Whether a reply names the sample's answer and none of its other choices.

    Raises:
        ValueError: the sample is no utility question.
    """
    if sample.answer is None:
        raise ValueError(f"the sample '{sample.id}' has no answer")
    return names_only(reply, sample.answer, sample.choices)
