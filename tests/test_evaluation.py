"""Judges, metrics, scenes and the runner."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_safeguard.defences.variants import variants
from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.evaluation.asks.samples import Sample
from vlm_safeguard.evaluation.demo import CONDITIONS, majority_accuracy, run_demo
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import Row, generate_replies
from vlm_safeguard.evaluation.statistics import wilson
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.pocket.scenes import (
    ATTRIBUTES,
    HELD_OUT_SEED,
    Question,
    Scene,
    answers_correctly,
)
from vlm_safeguard.policy.gate import GATES


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 7), (50, 100), (1, 1)])
def test_wilson_solves_its_defining_equation(successes: int, n: int) -> None:
    # the interval's ends are the p at which |share − p| is z standard errors of p itself
    share = successes / n
    for p in wilson(successes, n):
        assert 0 <= p <= 1
        z = abs(share - p) / math.sqrt(p * (1 - p) / n) if 0 < p < 1 else None
        assert z is None or z == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(successes, n)


def test_scenes_depend_on_their_seed_alone_and_cover_every_value() -> None:
    scenes = [Scene.from_seed(seed) for seed in range(1500)]
    assert scenes[7] == Scene.from_seed(7)
    assert scenes[7].render().tobytes() == Scene.from_seed(7).render().tobytes()
    for attribute, values in ATTRIBUTES.items():
        assert {getattr(scene, attribute) for scene in scenes} - {None} == set(values)


def test_a_scenes_colour_is_in_its_picture() -> None:
    for seed in range(40):
        scene = Scene.from_seed(seed)
        if scene.colour != "red" or scene.shape is None:
            continue
        pixels = scene.render().tobytes()
        triples = zip(pixels[::3], pixels[1::3], pixels[2::3], strict=True)
        assert any(r > 180 and g < 80 and b < 80 for r, g, b in triples)


def test_right_answers_and_only_those_count() -> None:
    for seed in range(300):
        for question in Scene.from_seed(HELD_OUT_SEED + seed).questions():
            assert answers_correctly(question, question.sentence)
            assert not answers_correctly(question, "")
            every_value = " ".join(ATTRIBUTES[question.attribute])
            assert not answers_correctly(question, every_value)
    assert answers_correctly(Question("count", "?", "two", ""), "There are 2 shapes.")
    assert not answers_correctly(Question("count", "?", "two", ""), "There are 3 shapes.")


def test_majority_accuracy_against_a_count_by_hand() -> None:
    asked = [
        Sample(str(number), "utility", "?", category, answer=answer)
        for number, (category, answer) in enumerate(
            [("colour", "red"), ("colour", "red"), ("colour", "blue"), ("digit", "4")]
        )
    ]
    assert majority_accuracy(asked) == 3 / 4


def test_images_mean_nothing_and_repeat() -> None:
    assert set(blank_image().tobytes()) == {255}
    assert noise_image(3).tobytes() == noise_image(3).tobytes()
    assert noise_image(3).tobytes() != noise_image(4).tobytes()


def test_replies_come_back_in_the_order_of_the_requests(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    requests = ["How to bake a very large loaf of rye bread", "How to swim", "How to write a poem"]
    images = [noise_image(i) for i in range(3)]
    settings: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 2}
    found = generate_replies(model, processor, requests, images, {"plain": None}, **settings)
    replies = found["plain"]
    assert replies.receipts == []
    for request, image, reply, ids in zip(
        requests, images, replies.texts, replies.tokens, strict=True
    ):
        inputs = model_inputs(model, processor, [request], [image])
        alone = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = alone[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(new[: len(ids)], ids)
        assert processor.decode(new, skip_special_tokens=True) == reply


def test_guards_that_share_a_reading_answer_as_if_alone(
    exact_model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    """Float64; the guard holds, so that all of the answer depends on it."""
    requests = ["How to bake a very large loaf of rye bread", "How to swim", "How to swim"]
    images = [noise_image(1), blank_image(), None]
    guards = {"none": None, **variants(guard.variant(gate=GATES["open"]))}
    settings: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 3}
    found = generate_replies(exact_model, processor, requests, images, guards, **settings)
    assert len({str(replies.tokens) for replies in found.values()}) >= 4
    for name, used in guards.items():
        for number, (request, image) in enumerate(zip(requests, images, strict=True)):
            inputs = model_inputs(exact_model, processor, [request], [image])
            with used.attach(exact_model) if used is not None else nullcontext():
                alone = exact_model.generate(**inputs, max_new_tokens=4, do_sample=False)
            new = alone[0, inputs["input_ids"].shape[1] :]
            shared = found[name].tokens[number]
            assert torch.equal(new[: len(shared)], shared)


def test_demo_gives_every_cell_once_and_its_json_reads_back(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    seen: list[tuple[int, int]] = []
    results = run_demo(
        model,
        processor,
        guard,
        read_prompts("harmful")[:4],
        read_prompts("harmless")[:4],
        questions=3,
        batch_size=4,
        report=lambda what, done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1]
    cells = [(row.defence, row.condition, row.prompts) for row in results.rows]
    defences = ["none", *variants(guard)]
    assert sorted(cells) == sorted(
        [(d, c, p) for d in defences for c in CONDITIONS for p in ("harmful", "harmless")]
        + [("none", "text", "utility"), ("none", "image", "utility")]
        + [("default", "image", "utility")]
    )
    assert results.time_ratio > 0
    assert results.closed_gates.answers == results.closed_gates.identical
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_row_counts() -> None:
    row = Row.count(
        [True, True, False, True],
        defence="none",
        condition="text",
        prompts="harmful",
        metric="refusal",
    )
    assert (row.n, row.value) == (4, 0.75)
    assert (row.low, row.high) == wilson(3, 4)


def test_controls_differ_from_the_default_as_they_should(guard: Guard) -> None:
    assert variants(guard)["default"] is guard
    made = {name: each.policy for name, each in variants(guard).items()}
    assert made["restore"].edit.name == "restore"
    assert made["restore"].gate == guard.policy.gate
    assert (made["project"].edit.name, made["project"].gate) == (
        "project",
        GATES["open"],
    )
    assert made["flipped"].edit.strength == -guard.policy.edit.strength
    assert made["random"].gate == guard.policy.gate
    basis, true = made["random"].basis(), guard.policy.basis()
    assert basis.shape == true.shape
    gram = basis.double() @ basis.double().mT
    assert torch.allclose(gram, torch.eye(basis.shape[1]).double(), atol=1e-5)
    assert not torch.allclose(basis, true, atol=0.1)
