"""Judges, metrics, scenes and the runner."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vlm_safeguard
from vlm_safeguard.defences.guarded import Guarded, sharing_readings
from vlm_safeguard.defences.prompts import NONE
from vlm_safeguard.defences.variants import VARIANTS, variants
from vlm_safeguard.evaluation import demo
from vlm_safeguard.evaluation.answers.direct import direct_answers
from vlm_safeguard.evaluation.asks.ask import Ask
from vlm_safeguard.evaluation.asks.conditions import condition_image
from vlm_safeguard.evaluation.asks.samples import Sample
from vlm_safeguard.evaluation.demo import majority_accuracy
from vlm_safeguard.evaluation.judges.refusal import is_refusal
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.evaluation.statistics import wilson
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.model.vlm import VLM
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


def asks_with(texts: Sequence[str], condition: str) -> list[Ask]:
    samples = [Sample(f"s{n}", "harmful", text) for n, text in enumerate(texts)]
    return [Ask("ours", condition, number, sample) for number, sample in enumerate(samples)]


def test_lines_come_in_the_order_of_the_asks_and_hold_what_each_is_answered_alone(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    texts = ["How to bake a very large loaf of rye bread", "How to swim", "How to write a poem"]
    asks = asks_with(texts, "noise")
    seen: list[tuple[str, int]] = []
    lines = direct_answers(
        VLM(model, processor),
        asks,
        lambda: {"none": NONE},
        max_new_tokens=4,
        batch_size=2,
        after_batch=lambda *each: seen.append(each),
    )
    assert seen == [("none", 2), ("none", 1)]
    assert [line.request for line in lines] == texts
    for number, line in enumerate(lines):
        image = condition_image("noise", number)
        inputs = model_inputs(model, processor, [texts[number]], [image])
        alone = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = alone[0, inputs["input_ids"].shape[1] :]
        assert line.answer == processor.decode(new, skip_special_tokens=True)
        assert (line.tokens, line.seconds, line.receipt) == (4, None, None)
        assert line.place == ("ours", "noise", f"s{number}")
        assert line.verdict("refusal").refused == is_refusal(line.answer)


@pytest.mark.parametrize("condition", ["text", "blank", "noise"])
def test_guards_that_share_a_reading_answer_as_if_alone(
    exact_model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
    condition: str,
) -> None:
    """Float64."""
    vlm = VLM(exact_model, processor)
    asks = asks_with(["How to bake a large loaf of rye bread", "How to swim", "Why?"], condition)
    guards = variants(guard.variant(gate=GATES["open"]), ("default", "refuse", "project"))
    lines = direct_answers(
        vlm,
        asks,
        lambda: {"none": NONE, **sharing_readings(guards)},
        max_new_tokens=4,
        batch_size=3,
    )
    answers = {(line.defence, line.sample): line for line in lines}
    assert len(answers) == (1 + len(guards)) * len(asks)
    assert condition == "text" or len({line.answer for line in lines}) >= 4
    for name, used in guards.items():
        for ask in asks:
            (alone,) = Guarded(used).generate(vlm, [ask.chat()], max_new_tokens=4)
            shared = answers[name, ask.sample.id]
            assert shared.answer == alone.text
            assert alone.receipt is not None
            assert shared.receipt is not None
            assert shared.receipt.guarded == alone.receipt.guarded


def test_guards_that_share_a_reading_make_one_text_only_pass(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    vlm, chats = VLM(model, processor), [asks_with(["How to swim"], "blank")[0].chat()]
    guards = dict.fromkeys(("one", "two", "three"), guard)
    hook = model.model.language_model.register_forward_hook(count)
    counts = []
    for defences in (
        [Guarded(each) for each in guards.values()],
        [*sharing_readings(guards).values()],
    ):
        passes = 0
        for defence in defences:
            defence.generate(vlm, chats, max_new_tokens=2)
        counts.append(passes)
    hook.remove()
    alone, shared = counts
    assert shared == alone - 2


def test_demo_gives_every_cell_once_and_its_json_reads_back(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
    tmp_path: Path,
) -> None:
    seen: list[tuple[int, int]] = []
    results = demo.run(
        VLM(model, processor),
        guard,
        prompts=4,
        questions=3,
        batch_size=4,
        out=tmp_path,
        report=lambda what, done, total: seen.append((done, total)),
    )
    assert (total := seen[0][1]) in [done for done, _ in seen]  # all answers, then the attack
    assert total == 3 * 3 * 2 * 4 + 3 * 3
    attacked = [row for row in results.attacks if row.metric == "attack_success"]
    assert Counter((row.attack, row.defence, row.through) for row in attacked) == Counter(
        (attack, defence, through)
        for attack, through in (("none", None), ("pgd", "refuse"))
        for defence in ("none", "refuse", "default")
    )
    assert len(list((tmp_path / "images").iterdir())) == demo.ATTACK.requests == attacked[0].n
    shares = [row for row in results.rows if row.metric in ("refusal", "accuracy")]
    defences = ["none", *variants(guard)]
    assert Counter((row.benchmark, row.defence, row.condition) for row in shares) == Counter(
        [(b, d, c) for b in ("harmful", "harmless") for d in defences for c in demo.CONDITIONS]
        + [("scenes", *cell) for cell in (("none", "text"), ("none", "own"), ("default", "own"))]
    )
    assert {row.n for row in shares if row.metric == "refusal"} == {4}
    assert results.closed_gates.answers == results.closed_gates.identical
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_demo_needs_no_inspect_ai() -> None:
    """As it is installed without the extra `eval`."""
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['inspect_ai', 'pyarrow']))\n"
        "import vlm_safeguard.cli.demo, vlm_safeguard.evaluation.demo\n"
    )
    source = str(Path(vlm_safeguard.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


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
    made = {name: VARIANTS[name](guard).policy for name in VARIANTS}
    assert made["refuse"].edit.name == "refuse"
    assert made["refuse"].gate == guard.policy.gate
    text = {"default", "text", "refusal", "text-always"}
    assert all(policy.edits for name, policy in made.items() if name not in text)
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
