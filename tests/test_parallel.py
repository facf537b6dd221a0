"""A model that several processes run together: guarded as by one, or refused."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from support.ranks import (
    GREEDY,
    WORLD,
    Answered,
    answered,
    opened_always,
    questions,
    run,
    small_fit,
    variants,
)
from support.reference import QUESTIONS, same_receipt
from tiny import load_makers
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.policy.receipt import Receipt

pytestmark = [pytest.mark.thorough, pytest.mark.xdist_group("parallel")]
VARIANTS = (
    "by the text's score",
    "open",
    "by its own refusal",
    "whole answers",
    "beams",
    "sampled",
    "from the texts",
)


@pytest.fixture(scope="module")
def experts() -> tuple[PreTrainedModel, Guard, dict[str, Any]]:
    """A model with experts, a guard for it, and requests with an image and without."""
    model, processor = load_makers()["qwen3_5_moe"]()
    inputs = model_inputs(model, processor, QUESTIONS[:2], [blank_image(), None])
    return model, opened_always(small_fit(model, processor), (1, 2)), dict(inputs)


@pytest.fixture(scope="module")
def seen(
    model: LlavaForConditionalGeneration,
    guard: Guard,
    experts: tuple[PreTrainedModel, Guard, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """By each process."""
    folder: Path = tmp_path_factory.mktemp("together")
    model.save_pretrained(folder)
    guard.save_pretrained(folder / "guard")
    with_experts, its_guard, inputs = experts
    with_experts.save_pretrained(folder / "experts")
    its_guard.save_pretrained(folder / "experts" / "guard")
    torch.save(inputs, folder / "experts" / "inputs.pt")
    with ProcessPoolExecutor(WORLD, get_context("spawn")) as processes:
        return list(processes.map(run, range(WORLD), [folder] * WORLD))


def check_same(by_one: Answered, by_each: list[Answered]) -> None:
    """Each process gives the same to the last bit, and one process the same but for rounding."""
    tokens, receipts = by_each[0]
    for other in by_each:
        assert other == (tokens, receipts)
    assert by_one[0] == tokens
    assert any(receipt["guarded"] for receipt in receipts)
    for ours, theirs in zip(receipts, by_one[1], strict=True):
        same_receipt(Receipt.model_validate(ours), Receipt.model_validate(theirs))


@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_parallel_processes_give_the_tokens_and_receipts_of_one(
    model: LlavaForConditionalGeneration, guard: Guard, seen: list[dict[str, Any]], name: str
) -> None:
    chosen, options = variants(guard)[name]
    check_same(answered(chosen, model, questions(), **options), [each[name] for each in seen])


def test_expert_parallel_processes_give_the_tokens_and_receipts_of_one(
    experts: tuple[PreTrainedModel, Guard, dict[str, Any]], seen: list[dict[str, Any]]
) -> None:
    """Half of the experts each, beside halves of everything else."""
    model, guard, inputs = experts
    by_one = answered(guard, model, inputs, **GREEDY)
    check_same(by_one, [each["experts"] for each in seen])


def test_the_variants_open_some_gates_and_leave_others_closed(
    guard: Guard, seen: list[dict[str, Any]]
) -> None:
    assert set(VARIANTS) == set(variants(guard))
    for name in ("by the text's score", "by its own refusal"):
        assert {receipt["guarded"] for receipt in seen[0][name][1]} == {True, False}


def test_a_guard_fitted_by_processes_together_is_that_of_one(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, seen: list[dict[str, Any]]
) -> None:
    one = small_fit(model, processor).policy.directions.vectors[2:4, 0]
    for each in seen:
        torch.testing.assert_close(torch.tensor(each["fitted"]), one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("what", "differs"),
    [
        ("other requests", "the tokens that they wrote"),
        ("other seeds", "the tokens that they wrote"),
        ("other decisions", "what they decided"),
    ],
)
def test_processes_that_differ_all_stop(
    seen: list[dict[str, Any]], what: str, differs: str
) -> None:
    """None goes on, and none waits for another; what was sampled apart goes no further."""
    for each in seen:
        assert f"differ in {differs}" in each[what]["error"]
        assert "set_seed" in each[what]["error"]
        assert len(each[what]["tokens"]) == (1 if what == "other seeds" else 0)


def test_a_weight_that_one_process_changed_is_noticed_and_all_stop(
    seen: list[dict[str, Any]],
) -> None:
    first, second = (each["other weights"] for each in seen)
    assert "Another of the processes" in first["inside"]
    assert "o_proj" in second["inside"]
    assert "written to" in second["inside"]
    for each in (first, second):
        assert "other weights" in each["attach"]
        assert "layers.1.self_attn.o_proj" in each["attach"]


def test_layers_that_hold_shards_of_the_tokens_are_refused(seen: list[dict[str, Any]]) -> None:
    """Whoever made them do so, and though the model works."""
    for each in seen:
        assert each["scattered"]["works"]
        assert "states of some tokens only" in each["scattered"]["attach"]
        assert 'tp_plan="auto"' in each["scattered"]["attach"]


@pytest.mark.parametrize("act", ["attach", "fit"])
def test_a_plan_with_sequence_parallelism_is_refused(seen: list[dict[str, Any]], act: str) -> None:
    for each in seen:
        assert "sequence parallelism" in each["sequence"][act]
        assert "input_layernorm" in each["sequence"][act]
        assert "Leave it out of the plan" in each["sequence"][act]


def test_pipeline_parallelism_over_processes_is_refused(
    model: LlavaForConditionalGeneration, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers marks a stage; it makes none of a vision-language model yet."""
    monkeypatch.setattr(model, "_pp_stage", object(), raising=False)
    with pytest.raises(SafeguardError, match=r"some of the model's layers only.*device_map"):
        guard.attach(model)


def test_fsdp_is_refused(seen: list[dict[str, Any]]) -> None:
    for each in seen:
        assert "device_map" in each["fsdp"]["attach"]
