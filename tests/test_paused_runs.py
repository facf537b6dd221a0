"""A guarded `generate` that is paused between two tokens goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaProcessor, StoppingCriteria, StoppingCriteriaList

from support.observe import Model, hooks
from support.reference import QUESTIONS, ask, with_thresholds
from tiny import each_family, load_makers
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.model.run_state import run_state_aside
from vlm_safeguard.policy.response import Response

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


class Every(StoppingCriteria):
    """Does something after every `period`-th token, and stops nothing."""

    def __init__(self, period: int, act: Callable[[], object]) -> None:
        self._period, self._act, self.count = period, act, 0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self.count += 1
        if self.count % self._period == 0:
            self._act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture
def halved(model: Model, processor: LlavaProcessor, guard: Guard) -> Guard:
    """Its gate opens for half of the questions."""
    with with_thresholds(guard, 1e9).attach(model) as attachment:
        receipts = attachment.generate(**ask(processor, QUESTIONS), max_new_tokens=1).receipts
    scores = sorted(receipt.scores["text_score"] for receipt in receipts)
    return with_thresholds(guard, (scores[1] + scores[2]) / 2)


@pytest.mark.parametrize("response", Response)
def test_others_run_in_between_and_every_output_is_its_own(
    model: Model, processor: LlavaProcessor, halved: Guard, response: Response
) -> None:
    guard = halved.variant(response=response, refusal_prefix=(20, 21, 22))
    long, other = ask(processor, QUESTIONS), ask(processor, QUESTIONS[:3])
    with guard.attach(model) as attachment:
        expected = attachment.generate(**long, **OPTIONS)
        between = attachment.generate(**other, **OPTIONS)
        assert {receipt.guarded for receipt in expected.receipts} == {True, False}
        given = []

        def pause() -> None:
            with attachment.paused(), ThreadPoolExecutor(1) as pool:
                given.append(pool.submit(attachment.generate, **other, **OPTIONS).result(60))

        paused = attachment.generate(
            **long, **OPTIONS, stopping_criteria=StoppingCriteriaList([Every(5, pause)])
        )
    assert len(given) >= 2
    for each in given:
        assert torch.equal(each.output, between.output)
        assert each.receipts == between.receipts
    assert torch.equal(paused.output, expected.output)
    assert paused.receipts == expected.receipts


def test_a_guard_that_comes_off_meanwhile_ends_the_run(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    state = hooks(model)
    attachment = open_guard.attach(model)
    attachment.__enter__()

    def leave() -> None:
        with attachment.paused(), ThreadPoolExecutor(1) as pool:
            pool.submit(attachment.__exit__, None, None, None).result(60)

    steps = Every(3, leave)
    with pytest.raises(SafeguardError, match="came off while this run was paused"):
        model.generate(**ask(processor, QUESTIONS[:1]), **OPTIONS, stopping_criteria=[steps])
    assert steps.count == 3
    assert hooks(model) == state


def test_only_a_run_of_this_thread_can_be_paused(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    attachment = open_guard.attach(model)
    with pytest.raises(SafeguardError, match="no guarded generate"), attachment.paused():
        pass
    paused = pytest.raises(SafeguardError, match="no guarded generate")
    with attachment, paused, attachment.paused():
        pass


@pytest.mark.parametrize("model_type", each_family())
def test_what_a_family_keeps_of_a_run_is_brought_back(model_type: str) -> None:
    """Another `generate`, on an image of another size, runs between two tokens."""
    model, processor = load_makers()[model_type]()
    model = model.double()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    asked = ["Why?", "How is bread made?"]
    images = [noise_image(1), noise_image(2).resize((96, 64))]
    first, other = (
        model_inputs(model, processor, [text], [image])
        for text, image in zip(asked, images, strict=True)
    )
    expected = model.generate(**first, **options)

    def run_other() -> None:
        with run_state_aside(model):
            model.generate(**other, **options)

    steps = Every(2, run_other)
    assert torch.equal(model.generate(**first, **options, stopping_criteria=[steps]), expected)
    assert steps.count == 4
