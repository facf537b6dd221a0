"""Attacks on a tiny model: their gradients, their bounds, what they give, and how it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, refitted, run_row, text_ids, with_thresholds
from tiny import TINY, load_makers
from vlm_safeguard.defences.defence import InPasses
from vlm_safeguard.defences.table import NAMES, defences
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.ask import Ask, AttackedAsk, asks_of
from vlm_safeguard.evaluation.asks.attempt import Attempt
from vlm_safeguard.evaluation.attack_plan import AttackPlan, SuffixPlan
from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
from vlm_safeguard.evaluation.attacks.descent import Budget, Descent
from vlm_safeguard.evaluation.attacks.openness import openness
from vlm_safeguard.evaluation.attacks.pgd import PGD
from vlm_safeguard.evaluation.attacks.pixels import Pixels
from vlm_safeguard.evaluation.attacks.prefill import BEGINNING, Prefill
from vlm_safeguard.evaluation.attacks.suffix import Search, Suffix
from vlm_safeguard.evaluation.attacks.target import Target
from vlm_safeguard.evaluation.attacks.universal import Universal
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.conversation import Turn, chat_of, encode_chats, request_text
from vlm_safeguard.model.sentences import learn_sentences
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.response import Response

Model = LlavaForConditionalGeneration
REFUSALS = (40, 41)  # tokens that stand for a refusal's first one; a random model has none
SOURCES = {
    name: name
    for name in NAMES
    if name not in ("ecso", "shiftdc", "canned", "goal-priority", "text", "refusal", "text-always")
}


@pytest.fixture(scope="module")
def vlm(model: Model, processor: LlavaProcessor) -> VLM:
    return VLM(model, processor)


def aimed(vlm: VLM, guard: Guard, name: str) -> Target:
    return replace(Target.of(vlm, guard, name), refusals=REFUSALS)


def drawn(count: int, condition: str = "noise") -> list[Ask]:
    return [replace(ask, condition=condition) for ask in asks_of("development", limit=count)]


def a_plan(**changes: Any) -> AttackPlan:
    small = {"steps": 6, "restarts": 1, "step": 8, "batch_size": 3, "confidence": 100.0}
    return AttackPlan(**(small | changes))


def attacked(ask: Ask, attempt: Attempt, folder: Path) -> AttackedAsk:
    return AttackedAsk(
        ask.benchmark, ask.condition, ask.number, ask.sample, attempt=attempt, folder=folder
    )


def losses_of(vlm: VLM, target: Target, asks: Sequence[Ask]) -> list[float]:
    """Of asks as they are, images and all, one by one by the model's own processor."""
    losses = []
    for ask in asks:
        with target.defence.applied(vlm, [ask.chat()]) as chats, torch.no_grad():
            logits = vlm.model(**vlm.encode(chats)).logits[:, -1]
        refusal = logits[0, list(REFUSALS)].max()
        logits[0, list(REFUSALS)] = -torch.inf
        losses.append(float(refusal - logits.max()))
    return losses


# --- pixels ---


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "internvl"])
def test_levels_become_what_the_processor_makes_of_the_image(name: str) -> None:
    """Patches, tiles and any normalisation, against the processor itself, file and all."""
    load_makers()
    _, processor = TINY[name]()
    pixels = Pixels.of(processor, noise_image(0))
    images = [pixels.image(pixels.levels_of(noise_image(seed))) for seed in (1, 2)]
    levels = torch.stack([pixels.levels_of(image) for image in images])
    batch = encode_chats(processor, [chat_of("What is it?", image) for image in images])
    torch.testing.assert_close(pixels(levels), batch["pixel_values"].float(), atol=1e-5, rtol=0)


def test_a_processor_that_blends_pixels_is_refused(processor: LlavaProcessor) -> None:
    class Blurred:
        def __init__(self) -> None:
            self.tokenizer = processor.tokenizer
            self.chat_template = processor.chat_template

        def apply_chat_template(self, *args: Any, **options: Any) -> Any:
            return processor.apply_chat_template(*args, **options)

        def __call__(self, *args: Any, **options: Any) -> Any:
            batch = processor(*args, **options)
            values = batch["pixel_values"]
            batch["pixel_values"] = (values + values.roll(1, -1)) / 2
            return batch

    with pytest.raises(SafeguardError, match="Blurred scales or blends"):
        Pixels.of(Blurred(), noise_image(0))  # type: ignore[arg-type]


# --- gradients ---


@pytest.mark.parametrize("name", SOURCES)
def test_gradients_through_a_defence_are_those_of_finite_differences(
    name: str, exact_model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    """In float64; through the edit, whose gate is held open, and through every other defence."""
    exact = VLM(exact_model, processor)
    fitted = refitted(open_guard, exact_model)
    target = Target.of(exact, fitted, name)
    assert target.name == name
    pixels = Pixels.of(processor, noise_image(0))
    shown = pixels.image(pixels.levels_of(noise_image(9)))
    chats = [chat_of(ask.sample.text, shown) for ask in drawn(2)]
    levels = torch.stack([pixels.levels_of(noise_image(seed)) for seed in (1, 2)]).double()
    weights = torch.randn(2, len(processor.tokenizer), generator=torch.Generator().manual_seed(0))
    way = torch.randn(levels.shape, generator=torch.Generator().manual_seed(1)).double()
    with target.passes(chats, pixels) as passes:

        def value(at: torch.Tensor) -> torch.Tensor:
            return (passes.logits(at) * weights.double()).sum()

        leaf = levels.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf)
        with torch.no_grad():
            h = 1e-3
            measured = (value(levels + h * way) - value(levels - h * way)) / (2 * h)
    assert gradient.abs().sum() > 0
    assert float((gradient * way).sum()) == pytest.approx(float(measured), rel=1e-5)
    assert all(weight.requires_grad for weight in exact_model.parameters())


def test_the_edit_is_in_the_gradient(vlm: VLM, open_guard: Guard) -> None:
    """Through an open guard it is another than through the bare model."""
    (ask,) = drawn(1)
    pixels = Pixels.of(vlm.processor, noise_image(0))
    levels = pixels.levels_of(noise_image(1))[None]
    gradients = []
    for name in ("none", "default"):
        target = aimed(vlm, open_guard, name)
        chat = chat_of(ask.sample.text, pixels.image(levels[0]))
        with target.passes([chat], pixels) as passes:
            leaf = levels.clone().requires_grad_()
            gradients.append(torch.autograd.grad(passes.logits(leaf)[0, 5], leaf)[0])
    bare, edited = gradients
    assert float(torch.nn.functional.cosine_similarity(bare, edited)) < 0.99


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_pass_of_its_own_beside_the_image_is_attacked_by_transfer(
    name: str, vlm: VLM, guard: Guard
) -> None:
    target = Target.of(vlm, guard, name)
    assert target.name == SOURCES.get(name, "none")
    assert isinstance(target.defence, InPasses)


# --- descents ---


@pytest.mark.parametrize("epsilon", [1, 8, 255])
def test_a_descent_stays_within_epsilon_and_valid_pixels_on_whole_levels(epsilon: int) -> None:
    """Against a quadratic whose least point lies outside of the box, in closed form."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(256, (3, 50), generator=generator).float()
    aim = torch.randint(-300, 600, (3, 50), generator=generator).float()
    budget = Budget(epsilon, steps=600, step=8, confidence=torch.inf)
    descent = Descent(start, budget, generator)
    while len(active := descent.active):
        descent.step(active, lambda levels: (levels - aim[active]).square().sum(1))
        assert torch.equal(descent.levels, descent.levels.round())
        assert (descent.levels - start).abs().max() <= epsilon
        assert descent.levels.min() >= 0
        assert descent.levels.max() <= 255
    nearest = aim.clamp(0, 255).clamp(start - epsilon, start + epsilon)
    assert (descent.best - nearest).abs().max() <= 1
    least = (descent.best - aim).square().sum(1)
    assert descent.loss.tolist() == pytest.approx(least.tolist())
    assert torch.equal(descent.taken, torch.full((3,), 600))


def test_an_image_whose_loss_is_low_enough_is_left_as_it_is() -> None:
    descent = Descent(torch.full((2, 4), 100.0), Budget(255, steps=9, step=4, confidence=5))
    low = torch.tensor([-6.0, 1.0])
    while len(active := descent.active):
        descent.step(active, lambda levels: levels.sum(1) * 0 + low[active])
    assert descent.taken.tolist() == [1, 9]
    assert torch.equal(descent.best, torch.full((2, 4), 100.0))


# --- PGD ---


@pytest.mark.parametrize("name", ["none", "default", "self-reminder"])
def test_pgd_lowers_the_loss_of_the_file_that_it_writes(
    name: str, vlm: VLM, open_guard: Guard, tmp_path: Path
) -> None:
    asks = drawn(4)
    target = aimed(vlm, open_guard, name)
    attempts = PGD(16)(target, asks, a_plan(), Checkpoints(tmp_path, []))
    files = [attacked(ask, x, tmp_path) for ask, x in zip(asks, attempts, strict=True)]
    before, after = losses_of(vlm, target, asks), losses_of(vlm, target, files)
    pixels = Pixels.of(vlm.processor, noise_image(0))
    for ask, attempt, first, last in zip(asks, attempts, before, after, strict=True):
        assert attempt.through == name
        assert attempt.steps == 6
        assert attempt.loss == pytest.approx((first, last), abs=1e-3)
        assert last < first - 0.1
        (shown,) = (part for part in ask.chat()[0].content if not isinstance(part, str))
        with Image.open(tmp_path / str(attempt.image)) as image:
            moved = pixels.levels_of(image) - pixels.levels_of(shown)
        assert 0 < moved.abs().max() <= 16


def test_the_best_of_all_restarts_is_kept(vlm: VLM, guard: Guard, tmp_path: Path) -> None:
    asks, target = drawn(3), aimed(vlm, guard, "none")
    runs = {
        restarts: PGD(32)(
            target, asks, a_plan(restarts=restarts), Checkpoints(tmp_path / str(restarts), [])
        )
        for restarts in (1, 2, 4)
    }
    for one, two, four in zip(*runs.values(), strict=True):
        assert one.loss is not None
        assert two.loss is not None
        assert four.loss is not None
        assert one.loss[0] == two.loss[0] == four.loss[0]
        assert four.loss[1] <= two.loss[1] <= one.loss[1]
        assert (one.steps, two.steps, four.steps) == (6, 12, 24)
    assert any(four.loss != one.loss for one, _, four in zip(*runs.values(), strict=True))


def test_a_killed_attack_goes_on_after_its_last_restart(
    vlm: VLM, guard: Guard, tmp_path: Path
) -> None:
    asks, target, plan = drawn(4), aimed(vlm, guard, "none"), a_plan(restarts=2)
    whole = PGD(8)(target, asks, plan, Checkpoints(tmp_path / "whole", []))
    steps = 0

    def killed(what: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 10:  # of 7 in each restart of a batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PGD(8)(target, asks, plan, Checkpoints(tmp_path / "cut", [], killed))
    left: list[str] = []
    again = Checkpoints(tmp_path / "cut", [], lambda what, done, total: left.append(what))
    resumed = PGD(8)(target, asks, plan, again)
    assert [x.model_copy(update={"seconds": 0}) for x in resumed] == [
        x.model_copy(update={"seconds": 0}) for x in whole
    ]
    assert len(left) == 3 * 7


def test_an_attack_on_pixels_needs_one_image(vlm: VLM, guard: Guard, tmp_path: Path) -> None:
    with pytest.raises(SafeguardError, match="needs a request with one image"):
        PGD(8)(aimed(vlm, guard, "none"), drawn(1, "text"), a_plan(), Checkpoints(tmp_path, []))


@pytest.mark.parametrize("response", [Response.TEXT, Response.REFUSAL])
def test_answers_from_the_text_are_the_same_whatever_the_attack(
    response: Response, vlm: VLM, open_guard: Guard, tmp_path: Path
) -> None:
    asks, name = drawn(4), str(response)
    target = aimed(vlm, open_guard, name)
    attempts = PGD(255)(target, asks, a_plan(), Checkpoints(tmp_path, []))
    assert {attempt.through for attempt in attempts} == {"none"}
    defence = defences(open_guard, [name])[name]
    files = [attacked(ask, x, tmp_path) for ask, x in zip(asks, attempts, strict=True)]
    as_they_are = defence.generate(vlm, [ask.chat() for ask in asks], max_new_tokens=6)
    under_attack = defence.generate(vlm, [ask.chat() for ask in files], max_new_tokens=6)
    assert [x.text for x in under_attack] == [x.text for x in as_they_are]
    moved = defences(open_guard, ["none"])["none"]
    assert [
        x.text for x in moved.generate(vlm, [ask.chat() for ask in files], max_new_tokens=6)
    ] != [x.text for x in moved.generate(vlm, [ask.chat() for ask in asks], max_new_tokens=6)]


# --- the others ---


def test_one_image_serves_all(vlm: VLM, open_guard: Guard, tmp_path: Path) -> None:
    asks = drawn(6)
    target = aimed(vlm, open_guard, "default")
    made = Universal(64, tuple(asks[:4]))(target, asks[4:], a_plan(), Checkpoints(tmp_path, []))
    (image,) = {attempt.image for attempt in made}
    assert image is not None
    before = losses_of(vlm, target, [replace(a, number=asks[0].number) for a in asks[:4]])
    after = losses_of(vlm, target, [attacked(ask, made[0], tmp_path) for ask in asks[:4]])
    assert made[0].loss == pytest.approx((sum(before) / 4, sum(after) / 4), abs=1e-3)
    assert sum(after) < sum(before)


def test_a_prefilled_answer_goes_on_behind_its_beginning(vlm: VLM, guard: Guard) -> None:
    (ask,) = drawn(1)
    (attempt,) = Prefill()(aimed(vlm, guard, "none"), [ask], a_plan(), None)  # type: ignore[arg-type]
    chat = attempt.chat(ask.chat(), Path())
    assert chat[-1] == Turn("assistant", (BEGINNING,))
    ids = vlm.encode([chat])["input_ids"][0].tolist()
    plain = vlm.encode([ask.chat()])["input_ids"][0].tolist()
    begun = vlm.tokenizer(BEGINNING, add_special_tokens=False)["input_ids"]
    assert ids == plain + begun
    answer = defences(guard, ["none"])["none"].generate(vlm, [chat], max_new_tokens=4)[0]
    inputs = vlm.encode([ask.chat()])
    row = torch.tensor([ids])
    by_hand = vlm.model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        pixel_values=inputs["pixel_values"],
        max_new_tokens=4,
        do_sample=False,
    )
    assert answer.text == vlm.processor.decode(by_hand[0, len(ids) :], skip_special_tokens=True)


def test_the_suffix_search_finds_the_best_token_of_all(vlm: VLM, guard: Guard) -> None:
    """With one token and a step that tries every swap, against trying them one by one."""
    target = aimed(vlm, guard, "none")
    chat = drawn(1)[0].chat()
    everything = SuffixPlan(tokens=1, steps=1, candidates=10_000, top_k=10_000)
    found = Search(target, chat, everything, 0).run()
    tokenizer, processor = vlm.tokenizer, vlm.processor
    request = request_text(chat).rstrip(".?")
    bare = encode_chats(processor, [chat_of(request)])["input_ids"]
    texts = [
        chat_of(request + tokenizer.decode([token]))
        for token in range(len(tokenizer))
        if token not in tokenizer.all_special_ids
    ]
    written = [encode_chats(processor, [text])["input_ids"] for text in texts]
    ids = torch.cat([each for each in written if each.shape[1] == bare.shape[1] + 1])
    assert len(ids) > 100
    with torch.no_grad():
        logits = vlm.model(input_ids=ids).logits[:, -1]
    refusal = logits[:, list(REFUSALS)].amax(1)
    logits[:, list(REFUSALS)] = -torch.inf
    best = float((refusal - logits.amax(1)).min())
    assert found.loss == pytest.approx(best, abs=1e-3)


def test_the_suffix_lowers_the_loss_of_the_text_as_it_is_written(
    vlm: VLM, guard: Guard, tmp_path: Path
) -> None:
    asks = drawn(2)
    plan = a_plan(suffix=SuffixPlan(tokens=4, steps=8, candidates=16, top_k=32))
    target = aimed(vlm, guard, "self-reminder")
    made = Suffix()(target, asks, plan, Checkpoints(tmp_path, []))
    texts = [replace(ask, condition="text") for ask in asks]
    files = [attacked(ask, x, tmp_path) for ask, x in zip(texts, made, strict=True)]
    samples = [replace(ask.sample, text=ask.sample.text.rstrip(".?")) for ask in texts]
    bare = [replace(ask, sample=sample) for ask, sample in zip(texts, samples, strict=True)]
    before, after = losses_of(vlm, target, bare), losses_of(vlm, target, files)
    for attempt, sample, file, first, last in zip(made, samples, files, before, after, strict=True):
        assert attempt.loss == pytest.approx((first, last), abs=1e-3)
        assert attempt.suffix
        assert request_text(file.chat()) == sample.text + attempt.suffix
        assert attempt.image is None
    assert sum(after) < sum(before)


def test_guards_share_the_suffixes_that_close_their_gate(
    vlm: VLM, guard: Guard, tmp_path: Path
) -> None:
    plan = a_plan(suffix=SuffixPlan(tokens=2, steps=1, candidates=2, top_k=2))
    asks, checkpoints = drawn(1), Checkpoints(tmp_path, [])
    made = {
        name: Suffix()(aimed(vlm, guard, name), asks, plan, checkpoints)
        for name in ("none", "default", "text", "canned")
    }
    assert made["default"] == made["text"] == made["canned"]
    assert [made[name][0].through for name in ("none", "default")] == ["none", "gate"]


def hiding(guard: Guard, processor: LlavaProcessor) -> Policy:
    """A gate that judges sentences, too, open by a refusal's token and by the score."""
    prompt = guard.policy.generation_prompt
    assert prompt is not None
    gate = with_thresholds(guard, -9.0, tokens=REFUSALS).policy
    return replace(gate, sentences=learn_sentences(processor, prompt, 2, 16))


@torch.no_grad()
def test_how_far_a_gate_is_open_is_what_its_criteria_measure(
    model: Model, vlm: VLM, guard: Guard, processor: LlavaProcessor
) -> None:
    """Against layers that are called one at a time on each text; some of them are sentences."""
    policy = hiding(guard, processor)
    text, own = policy.text_criterion, policy.criterion(OwnRefusal)
    assert text is not None
    assert own is not None
    texts = [text_ids(processor, question) for question in QUESTIONS]

    def measured(ids: list[int]) -> tuple[float, float]:
        """By how much a refusal's first token leads, and the score."""
        states, logits = run_row(model, ids)
        others = [x for token, x in enumerate(logits[-1].tolist()) if token not in REFUSALS]
        harm = [float(policy.directions.harm_score(states[n][-1:], n)) for n in text.layers]
        lead = max(float(logits[-1, token]) for token in REFUSALS) - max(others)
        return lead, sum(harm) / len(harm)

    each = [measured(ids) for ids in texts]
    middle = sorted(score for _, score in each)[len(texts) // 2]
    for floor, above in ((None, None), (middle, middle + 0.1), (middle - 9, None)):
        placed = own.model_copy(update={"score_floor": floor, "alone_above": above})
        for alone in ([False] * len(texts), [True, False] * (len(texts) // 2)):
            found = openness(vlm.backbone, policy.with_criterion(placed), texts, alone)
            for (lead, score), sentence, value in zip(each, alone, found.tolist(), strict=True):
                least = above if sentence else floor
                counted = lead if least is None else min(lead, max(8 * (score - least), -8))
                if sentence and above is None:
                    counted = min(lead, -8)
                expected = max(counted, 0) + 0.1 * min(counted, 0)
                expected += 8 * max(score - text.threshold, 0)
                assert value == pytest.approx(expected, abs=1e-3)


def test_a_suffix_is_sought_that_closes_the_gate_for_every_sentence(
    vlm: VLM, guard: Guard, processor: LlavaProcessor
) -> None:
    """A candidate counts as its text does that opens the gate furthest."""
    policy = hiding(guard, processor)
    target = replace(aimed(vlm, guard, "default"), gate=policy)
    chat = chat_of("How to swim? How to dive? How to")
    search = Search(target, chat, SuffixPlan(tokens=2, steps=3, candidates=8, top_k=8), 0)
    found = search.run()
    ids = text_ids(processor, request_text(chat) + found.text)
    judged = policy.judged(tuple(ids))
    assert len(judged) > 2
    with torch.no_grad():
        losses = [
            float(openness(vlm.backbone, policy, [each], [place > 0])[0])
            for place, each in enumerate(judged)
        ]
    assert found.loss == pytest.approx(max(losses), abs=1e-3)


def test_where_refusals_are_not_known_an_affirmative_start_is_sought(
    vlm: VLM, guard: Guard
) -> None:
    target = replace(Target.of(vlm, guard, "none"), refusals=())
    logits = torch.randn(3, len(vlm.tokenizer), generator=torch.Generator().manual_seed(0))
    sure = vlm.tokenizer("Sure", add_special_tokens=False)["input_ids"][0]
    expected = -(logits[:, sure].exp() / logits.exp().sum(1)).log()
    torch.testing.assert_close(target.losses(logits), expected)
