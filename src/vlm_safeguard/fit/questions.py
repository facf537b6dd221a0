"""Harmless questions about an image, read without one: what a gate must not open for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vlm_safeguard.anchors import shipped_image_questions
from vlm_safeguard.fit.further import parted
from vlm_safeguard.fit.own_decision import own_measures
from vlm_safeguard.model.activations import text_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.policy.calibration import Further, Judged, OwnDecision
from vlm_safeguard.policy.choice import Choice
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.sentences import Sentences

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def measure_questions(
    backbone: Backbone,
    processor: ProcessorMixin,
    prompt: GenerationPrompt,
    choice: Choice,
    own: OwnDecision | None,
    further: Further | None,
    sentences: Sentences | None,
    batch_size: int,
) -> Judged:
    """The shipped questions' scores, and whether the model would decline them.

    Args:
        own: the model's own decision; None where it cannot be read.
        further: what has the discriminant, where the gate is to read that.
    """
    asked = shipped_image_questions()
    rows = [prompt.judged(encode_chat(processor, question)) for question in asked]
    parts, owners = parted(rows, sentences, prompt)
    states, final = text_states(
        backbone, [*rows, *parts], batch_size=batch_size, label="image questions"
    )
    if further is None:
        text = choice.directions.harm_scores(states)[:, list(choice.legible)].mean(1).cpu()
    else:
        scores = further.shrunk.discriminant.scores(states)
        text = scores[:, list(further.shrunk.layers)].mean(1).cpu()
    measures = None if own is None else own_measures(backbone, rows, final, own)
    return Judged(text, measures, torch.tensor(owners))
