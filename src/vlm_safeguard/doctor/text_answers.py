"""Whether an answer from the text alone is the unguarded model's own, whatever the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.doctor.reference import text_inputs
from vlm_safeguard.doctor.subject import BUDGET, QUESTIONS, REQUESTS, Subject, require
from vlm_safeguard.policy.gate import GATES, TextScore
from vlm_safeguard.policy.response import Response

if TYPE_CHECKING:
    from transformers import BatchFeature

_OPEN = -1e9  # a threshold that every score passes
_TOKENS = 2


def answers_from_the_text(subject: Subject) -> str:
    """Beside an image, the answer to a request is that to its text; another image moves nothing."""
    prompts = [subject.inputs(QUESTIONS[:1], images=1, first=number) for number in range(2)]
    expected = subject.answer(_text_inputs(subject, prompts[0]), _TOKENS)
    layers = subject.guard.policy.layers
    scored = TextScore(layers=layers, threshold=_OPEN, budget=BUDGET, calibrated_on=REQUESTS)
    errors = []
    for gate in ((scored,), GATES["open"]):  # which has read the text before it is answered, or not
        guard = subject.guard.variant(gate=gate, response=Response.TEXT)
        with guard.attach(subject.model):
            answers = [subject.answer(inputs, _TOKENS) for inputs in prompts]
        logits = [answer.logits for answer in answers]
        require(torch.equal(*logits), "another image gives another answer")
        tokens = answers[0].tokens
        require(
            tokens == expected.tokens,
            f"the answer {tokens[0]} is not the model's own to the text, {expected.tokens[0]}",
        )
        errors.append(float((logits[0] - expected.logits).abs().max() / expected.logits.std()))
    error = max(errors)
    require(error <= subject.tolerance, f"logits differ by {error:.1e} of their spread")
    return (
        f"{_TOKENS} tokens beside two images: the same bit for bit, and the model's own to the "
        f"text; logits within {error:.0e} of their spread"
    )


def _text_inputs(subject: Subject, prompt: BatchFeature) -> Mapping[str, Any]:
    """A prompt's text alone, behind which the model answers at once."""
    policy = subject.guard.policy
    text = policy.text_view(prompt["input_ids"][0].tolist())
    if policy.generation_prompt is not None:
        text = policy.generation_prompt.judged(text)
    return text_inputs(subject, text)
