"""The allow-list of `generate`: complete for the installed transformers, and closed."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LlavaProcessor

from fuzzing.options import REFUSED as SETTINGS
from fuzzing.options import made
from support.observe import Model, Watch
from support.reference import QUESTIONS, ask
from vlm_safeguard.engines.hooks import options
from vlm_safeguard.engines.hooks.options import ALLOWED, REFUSED
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard


def test_every_option_of_the_installed_transformers_is_classified() -> None:
    names = {*vars(GenerationConfig()), *signature(GenerationMixin.generate).parameters}
    unknown = names - ALLOWED - REFUSED.keys()
    assert not unknown, f"say of each whether every token stays the guarded model's: {unknown}"


def test_no_option_is_in_both_tables() -> None:
    assert not ALLOWED & REFUSED.keys()


#: A value by which each refused option is set.
SET = made(SETTINGS)


def refused(model: Model, guard: Guard, inputs: dict[str, Tensor], **options: Any) -> str:
    watch = Watch()
    with guard.attach(model), pytest.raises(SafeguardError) as caught:
        model.generate(
            **inputs, max_new_tokens=2, streamer=watch, logits_processor=[watch], **options
        )
    assert watch.steps == 0
    assert watch.streamed == []
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_option_generates_nothing(
    model: Model, processor: LlavaProcessor, open_guard: Guard, name: str
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    said = refused(model, open_guard, inputs, **{name: SET[name]})
    assert name in said
    assert "nothing was generated" in said


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_option_in_a_config_generates_nothing(
    model: Model, processor: LlavaProcessor, open_guard: Guard, name: str
) -> None:
    """Of the call, and of the model itself."""
    inputs = ask(processor, QUESTIONS[:1])
    config = GenerationConfig()
    setattr(config, name, SET[name])
    assert name in refused(model, open_guard, inputs, generation_config=config)
    held = vars(model.generation_config).copy()
    setattr(model.generation_config, name, SET[name])
    try:
        assert name in refused(model, open_guard, inputs)
    finally:
        vars(model.generation_config).clear()
        vars(model.generation_config).update(held)


@pytest.mark.parametrize("name", ["new_way_of_drafting", "past_everything"])
def test_an_option_that_nobody_knows_is_refused(
    model: Model, processor: LlavaProcessor, open_guard: Guard, name: str
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    assert name in refused(model, open_guard, inputs, **{name: 1})


def test_a_field_that_a_new_transformers_brings_is_refused(
    model: Model,
    processor: LlavaProcessor,
    open_guard: Guard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if `top_h` were new: nobody has classified it."""
    monkeypatch.setattr(options, "ALLOWED", ALLOWED - {"top_h"})
    inputs = ask(processor, QUESTIONS[:1])
    config = GenerationConfig(top_h=0.5)
    assert "top_h" in refused(model, open_guard, inputs, generation_config=config)


def test_defaults_are_not_taken_for_settings(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    config = GenerationConfig(guidance_scale=1.0, num_beam_groups=1, token_healing=False)
    greedy = {"max_new_tokens": 2, "do_sample": False}
    with open_guard.attach(model):
        plain = model.generate(**inputs, **greedy)
        given = model.generate(**inputs, **greedy, generation_config=config)
    assert plain.tolist() == given.tolist()


@pytest.mark.parametrize("masked", [True, False])
def test_a_batch_of_no_request_is_refused(
    model: Model, processor: LlavaProcessor, open_guard: Guard, masked: bool
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    nothing = {"input_ids": inputs["input_ids"][:0], "pixel_values": inputs["pixel_values"]}
    if masked:
        nothing["attention_mask"] = inputs["attention_mask"][:0]
    assert "no request" in refused(model, open_guard, nothing)
