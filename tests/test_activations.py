"""Recorded states are those of the last token of each request, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask, run_row, text_ids
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.activations import (
    capture_last_token,
    hidden_states,
    image_states,
    text_states,
    with_hidden_states,
)
from vlm_safeguard.model.backbone import Backbone

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_text_states_equal_one_request_at_a_time(
    exact_model: LlavaForConditionalGeneration, processor: LlavaProcessor, batch_size: int
) -> None:
    backbone = Backbone.of(exact_model)
    rows = [text_ids(processor, question) for question in QUESTIONS]
    recorded, final = text_states(backbone, rows, batch_size=batch_size)
    assert recorded.dtype == torch.float32
    for number, question in enumerate(QUESTIONS):  # in the order given, not that of lengths
        ids = text_ids(processor, question)
        states, _ = run_row(exact_model, ids)
        expected = torch.stack([state[-1] for state in states]).float()
        torch.testing.assert_close(recorded[number], expected, rtol=1e-6, atol=1e-6)
        logits = exact_model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        mine = backbone.next_token_logits(final[number : number + 1])[0]
        torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_image_states_equal_one_request_at_a_time(
    exact_model: LlavaForConditionalGeneration, processor: LlavaProcessor, batch_size: int
) -> None:
    pictures = [noise_image(len(q)) if len(q) % 2 else blank_image() for q in QUESTIONS]
    recorded = image_states(
        Backbone.of(exact_model), processor, QUESTIONS, pictures, batch_size=batch_size
    )
    for number, question in enumerate(QUESTIONS):
        inputs = ask(processor, [question], dtype=torch.float64)
        states, _ = run_row(exact_model, inputs["input_ids"][0].tolist(), inputs["pixel_values"])
        expected = torch.stack([state[-1] for state in states]).float()
        # Left padding shifts LLaVA's own positions, whose angles are float32: hence 1e-4.
        torch.testing.assert_close(recorded[number], expected, rtol=1e-4, atol=1e-4)


def test_only_the_last_token_is_kept_and_hooks_go(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    backbone = Backbone.of(model)
    before = [len(layer._forward_hooks) for layer in backbone.layers]
    with capture_last_token(backbone) as states, torch.no_grad():
        backbone.run_text([[5, 6, 7], [8, 9]])
        assert [len(layer._forward_hooks) for layer in backbone.layers] == [n + 1 for n in before]
    assert sorted(states) == list(range(len(backbone.layers)))
    assert all(state.shape == (2, backbone.hidden_size) for state in states.values())
    assert all(state.untyped_storage().nbytes() == 4 * state.numel() for state in states.values())
    assert [len(layer._forward_hooks) for layer in backbone.layers] == before

    with pytest.raises(ZeroDivisionError), capture_last_token(backbone):
        _ = 1 / 0
    assert [len(layer._forward_hooks) for layer in backbone.layers] == before


def test_states_of_tuples_and_tensors() -> None:
    state = torch.zeros(1, 2, 3)
    assert hidden_states((state, None)) is state
    assert hidden_states(state) is state


def test_streams_that_stand_apart_are_read_and_written_side_by_side() -> None:
    output = torch.randn(3, 2, 4, 5)  # streams, batch, tokens, hidden: as Gemma 3n's layers give
    states = hidden_states((output, None), 0)
    assert states.shape == (2, 4, 15)
    assert torch.equal(states[1, 2], torch.cat([stream[1, 2] for stream in output]))
    edited = states.clone()
    edited[1, 2, 7] += 1.0
    back, rest = with_hidden_states((output, None), edited, 0)
    expected = output.clone()
    expected[1, 1, 2, 2] += 1.0
    assert torch.equal(back, expected)
    assert rest is None
