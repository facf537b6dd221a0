"""Whether a closed gate changes nothing."""

from __future__ import annotations

import torch

from vlm_safeguard.doctor.subject import BUDGET, QUESTIONS, REQUESTS, Subject, require
from vlm_safeguard.policy.gate import AnyCriterion, ImageScore, TextScore

_CLOSED = 1e9  # a threshold that no score passes
_TOKENS = 4


def closed_gate_identical(subject: Subject) -> str:
    """Where no gate opens, the tokens and logits are the unguarded model's."""
    policy = subject.guard.policy
    closed: list[AnyCriterion] = [
        TextScore(layers=policy.layers, threshold=_CLOSED, budget=BUDGET, calibrated_on=REQUESTS)
    ]
    if (image_score := policy.criterion(ImageScore)) is not None:
        closed.append(image_score.model_copy(update={"threshold": _CLOSED}))
    inputs = subject.inputs(QUESTIONS, images=1)
    free = subject.answer(inputs, _TOKENS).logits
    with subject.guard.variant(gate=tuple(closed)).attach(subject.model):
        guarded = subject.answer(inputs, _TOKENS).logits
    require(
        torch.equal(free, guarded), "with every gate closed, logits differ from the model's own"
    )
    return f"{len(QUESTIONS)} rows, {_TOKENS} tokens: logits bit for bit"
