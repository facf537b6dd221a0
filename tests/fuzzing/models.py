"""The models that cases run on, and their guards."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from support.observe import Model
from support.reference import make_exact
from tiny import load_makers
from tiny.pocket import make_model, make_processor
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.sentences import learn_sentences
from vlm_safeguard.policy.sentences import Sentences


@cache
def model() -> Model:
    """In float64 throughout, so that no rounding moves a token."""
    made = make_exact(make_model(make_processor()))
    ids = torch.tensor([[5, 6, 7]])
    made(input_ids=ids, output_hidden_states=True, output_attentions=True)  # puts on its own hooks
    return made


@cache
def fitted() -> Guard:
    return Guard.fit(
        model(),
        make_processor(),
        anchors=shipped_anchors()[:24],
        calibration=shipped_calibration()[:40],
        budget=0.1,
        layers=(2, 3),
        rank=3,
        gate="calibrated",
    )


@cache
def sentences() -> Sentences:
    """How the fitted guard's requests are parted."""
    prompt = fitted().policy.generation_prompt
    assert prompt is not None
    return learn_sentences(make_processor(), prompt, 2, 4)


@cache
def family(model_type: str) -> tuple[Any, Any, Guard]:
    """A small model of another family, its processor and its guard."""
    model, processor = load_makers()[model_type]()
    guard = Guard.fit(
        model,
        processor,
        anchors=shipped_anchors()[:12],
        calibration=shipped_calibration()[:21],
        budget=0.2,
        rank=3,
        gate="calibrated",
    )
    return model, processor, guard
