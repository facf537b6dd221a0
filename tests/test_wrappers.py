"""A model in a wrapper: guarded through it token for token, or refused, with what to give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaProcessor, pipeline

from support.observe import Model, hooks
from support.reference import QUESTIONS, ask, refitted
from vlm_safeguard.anchors import shipped_anchors
from vlm_safeguard.doctor import Examination
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.wrappers import unwrapped

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def own(model: Model) -> Model:
    """A copy to wrap."""
    return copy.deepcopy(model)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def both_ways(model: Any, generating: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Tokens of `generate`, and logits of a plain `forward` over the prompts."""
    tokens = generating.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with torch.no_grad():
        return [tokens, model(**inputs).logits]


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_peft_model_is_guarded_through_its_wrapper(
    own: Model, processor: LlavaProcessor, open_guard: Guard, task: str | None
) -> None:
    """Its adapter is as it begins, so that it changes nothing."""
    inputs = ask(processor, QUESTIONS[:2])
    free = both_ways(own, own, inputs)
    with open_guard.attach(own):
        expected = both_ways(own, own, inputs)
    config = peft.LoraConfig(**LORA, task_type=task)
    wrapped = peft.get_peft_model(own, config).eval()
    assert unwrapped(wrapped) is own
    guard = refitted(open_guard, own)
    state = hooks(own)
    with guard.attach(wrapped):
        found = both_ways(wrapped, wrapped, inputs)
        assert all(receipt.guarded for receipt in guard.receipts)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[1], free[1])
    assert all(map(torch.equal, both_ways(wrapped, wrapped, inputs), free))
    assert hooks(own) == state


def test_a_distributed_model_is_guarded_through_its_wrapper(
    own: Model, processor: LlavaProcessor, open_guard: Guard, process_group: None
) -> None:
    inputs = ask(processor, QUESTIONS[:2])
    with open_guard.attach(own):
        expected = both_ways(own, own, inputs)
    wrapped = DistributedDataParallel(own)
    with open_guard.attach(wrapped):  # type: ignore[arg-type]
        found = both_ways(wrapped, wrapped.module, inputs)
    assert all(map(torch.equal, found, expected))


def test_a_guard_is_fitted_and_examined_through_a_wrapper(
    own: Model, processor: LlavaProcessor, process_group: None
) -> None:
    wrapped: Any = DistributedDataParallel(own)
    calibration = [f"How to count to {i}" for i in range(9)]
    guard = Guard.fit(
        wrapped,
        processor,
        anchors=shipped_anchors()[:12],
        calibration=calibration,
        budget=0.2,
        rank=4,
        gate="calibrated",
    )
    assert guard.provenance.architecture == type(own).__name__
    outcomes = {check.name: check for check in Examination(wrapped, processor, guard).run()}
    assert outcomes["hooks act"].passed


def test_a_model_that_accelerate_prepared_is_guarded(
    own: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    from accelerate import Accelerator

    inputs = ask(processor, QUESTIONS[:2])
    with open_guard.attach(own):
        expected = both_ways(own, own, inputs)
    prepared = Accelerator(cpu=True).prepare(own)
    with open_guard.attach(prepared):
        assert all(map(torch.equal, both_ways(prepared, prepared, inputs), expected))


class Wrapper(nn.Module):
    """Somebody's own."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.policy = inside


def sharded(model: Model) -> Any:
    """As `fully_shard` does it, a base class is added to the model's own."""
    model.__class__ = type("FSDPLlava", (type("FSDPModule", (), {}), type(model)), {})
    return model


def compiled_in_place(model: Model) -> Any:
    model.compile(backend="eager")
    return model


def autocast(model: Model) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    finally:
        AcceleratorState._reset_state()


def soft_prompt(model: Model) -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


def prefix(model: Model) -> Any:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


REFUSED: dict[str, tuple[Callable[[Model], Any], str]] = {
    "torch.compile": (lambda m: torch.compile(m, backend="eager"), "let generate compile it"),
    "model.compile": (compiled_in_place, r"After model.compile\(\).*let generate compile it"),
    "DataParallel": (nn.DataParallel, "DataParallel copies the model.*device_map"),
    "FSDP": (sharded, "shards.*Give the model itself"),
    "DeepSpeed": (type("DeepSpeedEngine", (Wrapper,), {}), r"engine's \.module"),
    "mixed precision": (autocast, "mixed precision.*Load the model in bfloat16"),
    "a soft prompt": (soft_prompt, "PROMPT_TUNING.*learnt tokens"),
    "a prefix": (prefix, "PREFIX_TUNING.*learnt tokens"),
    "an unknown wrapper": (Wrapper, r"Wrapper is a wrapper.*its \.policy\)"),
    "another module": (lambda m: nn.Linear(2, 2), "has no config. Load it"),
    "a name": (lambda m: "llava-hf/llava-1.5-7b-hf", "str is not a transformers model. Give one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_guard_does_not_act_through_is_refused_with_what_to_give(
    own: Model, processor: LlavaProcessor, open_guard: Guard, name: str
) -> None:
    wrap, message = REFUSED[name]
    wrapped = wrap(own)
    for use in (
        lambda: open_guard.attach(wrapped),
        lambda: Guard.fit(wrapped, processor),
        lambda: Examination(wrapped, processor),
    ):
        with pytest.raises(SafeguardError, match=message):
            use()


def test_of_a_pipeline_the_model_is_asked_for(
    own: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    pipe: Any = pipeline("image-text-to-text", model=own, processor=processor)
    with pytest.raises(SafeguardError, match=r"pipe\.model"):
        open_guard.attach(pipe)
    with open_guard.attach(pipe.model):
        pass
