"""Whether an answer from the text alone is the unguarded model's own, whatever the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.doctor.reference import text_inputs
from vlm_safeguard.doctor.subject import BUDGET, QUESTIONS, REQUESTS, Answer, Subject, require
from vlm_safeguard.policy.gate import GATES, TextScore
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.token_ids import same_start

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
        first, second = answers
        require(torch.equal(first.logits, second.logits), "another image gives another answer")
        errors.append(_error(first, expected))
        require(
            errors[-1] <= subject.tolerance,
            f"the answer {first.tokens[0]} is not the model's own to the text, "
            f"{expected.tokens[0]}: logits differ by {errors[-1]:.1e} of their spread",
        )
    return (
        f"{_TOKENS} tokens beside two images: the same bit for bit, and the model's own to the "
        f"text; logits within {max(errors):.0e} of their spread"
    )


def _error(answer: Answer, expected: Answer) -> float:
    """By how much logits differ, up to the first token that does.

    Two tokens that lead by less than the tolerance may change places; what follows is other text.
    """
    steps = same_start(answer.tokens[0], expected.tokens[0]) + 1
    apart = (answer.logits[:steps] - expected.logits[:steps]).abs().max()
    return float(apart / expected.logits.std())


def _text_inputs(subject: Subject, prompt: BatchFeature) -> Mapping[str, Any]:
    """A prompt's text alone, behind which the model answers at once."""
    policy = subject.guard.policy
    text = policy.text_view(prompt["input_ids"][0].tolist())
    if policy.generation_prompt is not None:
        text = policy.generation_prompt.judged(text)
    return text_inputs(subject, text)
