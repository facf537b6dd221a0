"""Ways of generating: each equals plain hooks that do the same edit, or is refused beforehand."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)

from support.packed import pack
from support.reference import (
    QUESTIONS,
    ask,
    edited_by_hand,
    opened_by_hand,
    reread_by_hand,
    small_guard,
    spanning,
)
from support.turns import in_turns
from tiny import load_makers
from tiny.pocket import make_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.conversation import encode_batch
from vlm_safeguard.model.generation_prompt import learn_generation_prompt
from vlm_safeguard.policy.edits import Project
from vlm_safeguard.policy.gate import GATES, TextScore
from vlm_safeguard.policy.span import Span

pytestmark = pytest.mark.versions

Model = LlavaForConditionalGeneration


def answer(model: Any, inputs: Any, **options: Any) -> Any:
    """Eight new tokens and their logits, with a fixed seed."""
    torch.manual_seed(0)
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return model.generate(**inputs, **given, output_logits=True, return_dict_in_generate=True)


def texts_of(guard: Guard, inputs: Any) -> list[list[int]]:
    """The rows' text-only views, unpadded."""
    return [
        guard.policy.text_view(row[keep.bool()].tolist())
        for row, keep in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def same(found: Any, expected: Any, free: Any, tolerance: float = 1e-4) -> None:
    """Equal tokens and, within `tolerance` of their spread, logits; other than unguarded ones."""
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.std())
    assert not torch.equal(found.logits[0], free.logits[0])


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "static cache": {"cache_implementation": "static"},
    "sliding-window cache": {"cache_implementation": "sliding_window"},
    "hybrid cache": {"cache_implementation": "hybrid"},
    "quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}


@pytest.mark.parametrize(("options", "span"), in_turns(WAYS, [Span.ANSWER, Span.OPENING]))
def test_a_way_of_generating_equals_plain_hooks(
    exact_model: Model,
    processor: LlavaProcessor,
    open_guard: Guard,
    options: dict[str, Any],
    span: Span,
) -> None:
    model = exact_model  # lest rounding falls on two sides of a step of the quantized cache
    guard = spanning(open_guard, span)
    inputs = ask(processor, QUESTIONS[:3])
    free = answer(model, inputs, **options)
    with edited_by_hand(model, guard, texts_of(guard, inputs)):
        expected = answer(model, inputs, **options)
    with guard.attach(model):
        found = answer(model, inputs, **options)
    same(found, expected, free, tolerance=1e-10)


@pytest.fixture(scope="module")
def opening_guard(model: Model, processor: LlavaProcessor, open_guard: Guard) -> Guard:
    """Its answer to the first question follows its opening."""
    return opened_by_hand(model, processor, spanning(open_guard, Span.OPENING), QUESTIONS[0])


#: Beside greedy ones: rows that swap, that are drawn and are several; caches of either kind.
_SHOWN = ("greedy", "sampled beams", "static cache", "sliding-window cache")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if way in _SHOWN else pytest.mark.thorough)
        for way in WAYS
        if way != "quantized cache"
    ],
)
def test_an_answers_opening_is_edited_as_plain_hooks_do_that_read_all_again(
    model: Model, processor: LlavaProcessor, opening_guard: Guard, way: str
) -> None:
    """Two tokens to choose from at each step: answers and beams follow the opening or leave it."""
    guard = opening_guard
    opening, others = (
        guard.policy.refusal_prefix,
        [token % 50 + 5 for token in guard.policy.refusal_prefix],
    )
    inputs = ask(processor, QUESTIONS[:3])
    prompt = inputs["input_ids"].shape[1]

    def allowed(row: int, ids: Tensor) -> list[int]:
        step = len(ids) - prompt
        return [opening[step], others[step]] if step < len(opening) else list(range(5, 60))

    options = {**WAYS[way], "prefix_allowed_tokens_fn": allowed}
    cacheless = {k: v for k, v in options.items() if not k.startswith("cache")}
    with guard.variant(refusal_prefix=()).attach(model):
        unopened = answer(model, inputs, **options)
    with reread_by_hand(model, guard, texts_of(guard, inputs)):
        expected = answer(model, inputs, **cacheless, use_cache=False)
    with guard.attach(model):
        found = answer(model, inputs, **options)
    same(found, expected, answer(model, inputs, **options))
    said = {tuple(row) for row in found.sequences[:, prompt : prompt + 3].tolist()}
    assert any(row[0] == opening[0] for row in said), "none follows it, so nothing is shown"
    assert any(
        not torch.allclose(ours, theirs)
        for ours, theirs in zip(found.logits, unopened.logits, strict=True)
    )


@cache
def guarded_family(family: str) -> tuple[Any, Any, Guard]:
    """A model, its processor and a guard that is always open."""
    model, processor = load_makers()[family]()
    return model, processor, small_guard(model, processor).variant(gate=GATES["open"])


@pytest.mark.xdist_group("generation of families")
@pytest.mark.parametrize("way", ["greedy", "beams", "static cache"])
@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "lfm2_vl"])
def test_so_it_does_with_sliding_windows_many_positions_and_convolutions(
    family: str, way: str
) -> None:
    model, processor, guard = guarded_family(family)
    pictures = [[noise_image(i).resize((96, 64))] for i in range(2)]
    inputs = encode_batch(processor, QUESTIONS[:2], pictures)
    free = answer(model, inputs, **WAYS[way])
    with edited_by_hand(model, guard, texts_of(guard, inputs)):
        expected = answer(model, inputs, **WAYS[way])
    with guard.attach(model):
        found = answer(model, inputs, **WAYS[way])
    same(found, expected, free)


@pytest.mark.parametrize("hold", [True, False])
def test_drafts_looked_up_in_the_prompt_change_nothing(
    exact_model: Model, processor: LlavaProcessor, open_guard: Guard, hold: bool
) -> None:
    """Without images, whose placeholders LLaVA itself cannot draft."""
    guard = open_guard.variant(edit=Project(span=Span.ANSWER if hold else Span.LAST))
    inputs = ask(processor, ["Which colour? Which colour? Which colour?"], images=False)
    free = answer(exact_model, inputs)
    with guard.attach(exact_model):
        expected = answer(exact_model, inputs)
        found = answer(exact_model, inputs, prompt_lookup_num_tokens=3)
    same(found, expected, free)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_plain_hooks(
    model: Model, processor: LlavaProcessor, open_guard: Guard, dtype: torch.dtype
) -> None:
    half = copy.deepcopy(model).to(dtype)
    inputs = ask(processor, QUESTIONS[:3], dtype=dtype)
    free = answer(half, inputs)
    with edited_by_hand(half, open_guard, texts_of(open_guard, inputs)):
        expected = answer(half, inputs)
    with open_guard.attach(half):
        found = answer(half, inputs)
    same(found, expected, free, tolerance=0.1)


@pytest.mark.parametrize("hold", [True, False])
def test_a_chat_that_keeps_its_cache_equals_plain_hooks(
    model: Model, processor: LlavaProcessor, open_guard: Guard, hold: bool
) -> None:
    guard = spanning(open_guard, Span.ANSWER if hold else Span.OPENING)
    inputs = ask(processor, QUESTIONS[:2])
    more = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor(learn_generation_prompt(processor).direct)
    more = torch.cat([more, ends.expand(2, -1)], dim=1)

    def second_turn(first: Any) -> dict[str, Tensor]:
        ids = torch.cat([first.sequences, more], dim=1)
        grown = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1]).long()
        mask = torch.cat([inputs["attention_mask"], grown], dim=1)
        return {"input_ids": ids, "attention_mask": mask}

    with edited_by_hand(model, guard, texts_of(guard, inputs)):
        first = answer(model, inputs)
    turn = second_turn(first)
    free = answer(model, {**turn, "pixel_values": inputs["pixel_values"]})
    with edited_by_hand(model, guard, texts_of(guard, turn)):
        expected = answer(model, turn, past_key_values=first.past_key_values)
    with guard.attach(model):
        first = answer(model, inputs)
        found = answer(model, second_turn(first), past_key_values=first.past_key_values)
    same(found, expected, free)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param("nothing", marks=pytest.mark.thorough),
        "the opening",
        pytest.param("everything", marks=pytest.mark.thorough),
    ],
)
def test_compiled_decoding_equals_plain_hooks(
    processor: LlavaProcessor, open_guard: Guard, after: str
) -> None:
    """Compiled by `generate` itself, as it does for static caches on a GPU."""
    hold = after == "everything"
    guard = spanning(open_guard, Span.ANSWER if hold else Span.OPENING)
    model = make_model(processor)
    inputs = ask(processor, QUESTIONS[:2])
    if after == "the opening":
        guard = opened_by_hand(model, processor, guard, QUESTIONS[0])
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    by_hand = edited_by_hand if hold else reread_by_hand
    with by_hand(model, guard, texts_of(guard, inputs)):
        expected = answer(model, inputs, use_cache=hold)
    torch._dynamo.reset()
    free = answer(model, inputs, **options)
    unguarded, graphs[:] = list(graphs), []
    torch._dynamo.reset()
    with guard.attach(model):
        found = answer(model, inputs, **options)
    same(found, expected, free)
    assert len(unguarded) == 1
    # passes whose layers carry hooks are not compiled; the others compile to the very same graph
    assert graphs == ([] if hold else unguarded)


def test_a_pipeline_is_guarded(model: Model, processor: LlavaProcessor, open_guard: Guard) -> None:
    ask_it = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": noise_image(1)}, {"type": "text", "text": QUESTIONS[0]}]
    chat = [{"role": "user", "content": content}]
    options = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 8}}
    inputs = encode_batch(processor, QUESTIONS[:1], [[noise_image(1)]])
    free = ask_it(text=chat, **options)
    with open_guard.attach(model):
        found = ask_it(text=chat, **options)
        assert open_guard.receipts[0].guarded
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert found != free
    said = found[0]["generated_text"][-1]["content"]
    new = expected[0, inputs["input_ids"].shape[1] :]
    assert said == processor.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_guard_and_answer(
    model: Model, processor: LlavaProcessor, open_guard: Guard, where: str, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")  # an extra's: `make test-oldest` has none
    inputs = ask(processor, QUESTIONS[:2])
    with open_guard.attach(model):
        expected = answer(model, inputs)
    elsewhere = make_model(processor)
    device = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(elsewhere, device)
    else:
        accelerate.disk_offload(elsewhere, str(tmp_path), execution_device=device)
    assert elsewhere.get_input_embeddings().weight.device.type == "meta"
    with open_guard.attach(elsewhere):
        found = answer(elsewhere, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))
    short = {"rank": 4, "budget": 0.2, "calibration": [f"How to count to {i}" for i in range(9)]}
    here, there = (Guard.fit(m, processor, **short, gate="calibrated") for m in (model, elsewhere))  # type: ignore[arg-type]
    assert torch.equal(here.policy.directions.vectors, there.policy.directions.vectors)
    assert here.policy.gate == there.policy.gate


def test_weights_kept_packed_equal_plain_hooks(
    processor: LlavaProcessor, open_guard: Guard
) -> None:
    model = make_model(processor)
    pack(model)
    inputs = ask(processor, QUESTIONS[:2])
    free = answer(model, inputs)
    with edited_by_hand(model, open_guard, texts_of(open_guard, inputs)):
        expected = answer(model, inputs)
    with open_guard.attach(model):  # and it knows the model again by its behaviour
        found = answer(model, inputs)
    same(found, expected, free)
    fitted = Guard.fit(
        model,
        processor,
        rank=4,
        budget=0.2,
        calibration=[f"How to count to {i}" for i in range(9)],
        gate="calibrated",
    )
    assert fitted.policy.criterion(TextScore) is not None


REFUSED: dict[str, dict[str, Any]] = {
    "guidance_scale": {"guidance_scale": 1.5},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "force_words_ids": {"force_words_ids": [[7]], "num_beams": 3},
    "custom_generate": {"custom_generate": "somebody/decoding"},
    "assistant_early_exit": {"assistant_early_exit": 2},
}


@pytest.mark.parametrize("as_config", [True, False])
@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_be_guarded_is_refused_before_any_pass(
    model: Model, processor: LlavaProcessor, open_guard: Guard, option: str, as_config: bool
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    options = REFUSED[option]
    if as_config:
        config = GenerationConfig(max_new_tokens=2)
        for name, value in options.items():
            setattr(config, name, value)
        options = {"generation_config": config}
    passes: list[int] = []
    with open_guard.attach(model):
        handle = model.register_forward_pre_hook(lambda m, args: passes.append(1))
        with pytest.raises(
            SafeguardError, match=rf"generate\({option}=…\) .*nothing was generated"
        ):
            model.generate(**inputs, **options)
        handle.remove()
        assert not passes
        assert answer(model, inputs).sequences.shape[0] == 1  # the guard still works
