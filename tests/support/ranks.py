"""Two processes that run one model together, as torchrun starts them, and what each of them saw."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import (
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    set_seed,
)
from transformers.distributed import DistributedConfig

from support.observe import Watch
from support.reference import QUESTIONS, ask, spanning, with_thresholds
from tiny.pocket import make_processor
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span

WORLD = 2
NORMS = "model.language_model.layers.*.input_layernorm"
Answered = tuple[list[list[int]], list[dict[str, Any]]]  # tokens, receipts
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True}


def variants(guard: Guard) -> dict[str, tuple[Guard, dict[str, Any]]]:
    """Guards, and ways of decoding, under which both have to give what one process gives."""
    opened = opened_always(guard)
    threshold = float(guard.scores["calibration"].quantile(0.95))
    return {
        "by the text's score": (with_thresholds(guard, threshold, image=100.0), GREEDY),
        "open": (opened, GREEDY),
        "by its own refusal": (with_thresholds(guard, 0.0, tokens=(7, 8, 9)), GREEDY),
        "whole answers": (spanning(opened, Span.ANSWER), GREEDY),
        "beams": (opened, GREEDY | {"num_beams": 2}),
        "sampled": (opened, SAMPLED),
        "from the texts": (opened.variant(response=Response.TEXT), GREEDY),
    }


def opened_always(guard: Guard, layers: tuple[int, ...] = (1, 2, 3, 4)) -> Guard:
    return guard.variant(layers=layers, gate=GATES["open"])


def questions() -> dict[str, Tensor]:
    """With images and without."""
    return ask(make_processor(), QUESTIONS, images=[True, False, True, True])


def small_fit(model: PreTrainedModel, processor: Any) -> Guard:
    return Guard.fit(
        model,
        processor,
        anchors=shipped_anchors()[:12],
        calibration=shipped_calibration()[:20],
        layers=(2, 3),
        rank=3,
        budget=0.2,
        gate="calibrated",
    )


def answered(
    guard: Guard, model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any
) -> Answered:
    """Tokens and receipts of a seeded `generate`."""
    with guard.attach(model) as attachment:
        set_seed(0)
        tokens, receipts = attachment.generate(**inputs, **options)
    return tokens.tolist(), [receipt.model_dump() for receipt in receipts]


def scatter_tokens(model: LlavaForConditionalGeneration, rank: int) -> None:
    """Sequence parallelism by hand: the layers hand each other shards of the tokens."""
    decoder = model.model.language_model
    width = 0

    def share(module: nn.Module, *, first: bool = False, last: bool = False) -> None:
        forward = module.forward

        def on_a_shard(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal width
            if first:
                width = states.shape[1]
            else:
                states = gathered(states)
            states = forward(states, *args, **kwargs)
            return states if last else states.tensor_split(WORLD, dim=1)[rank]

        module.forward = on_a_shard

    def gathered(states: Tensor) -> Tensor:
        whole = states.new_zeros(states.shape[0], width, states.shape[2])
        whole.tensor_split(WORLD, dim=1)[rank].copy_(states)
        distributed.all_reduce(whole)
        return whole

    for i, layer in enumerate(decoder.layers):
        share(layer, first=i == 0)
    share(decoder.norm, last=True)


# --- what each process does ---


def run(rank: int, folder: Path) -> dict[str, Any]:
    """Load the models in `folder` together with the other process; gives what was seen there."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )
    try:
        guard = Guard.from_pretrained(folder / "guard")
        model = load(folder, tp_plan="auto")
        return {
            **given_alike(model, guard),
            **given_differently(model, guard, rank),
            "scattered": scattered(load(folder, tp_plan="auto"), guard, rank),
            "sequence": sequence(folder, guard),
            "experts": experts(folder / "experts"),
            "other weights": other_weights(load(folder, tp_plan="auto"), guard, rank),
            "fsdp": {"attach": error(lambda: guard.attach(load(folder, fsdp_size=WORLD)))},
        }
    finally:
        distributed.destroy_process_group()


def load(folder: Path, **plan: Any) -> Any:
    config = DistributedConfig(**plan)
    return AutoModelForImageTextToText.from_pretrained(folder, distributed_config=config).eval()


def given_alike(model: LlavaForConditionalGeneration, guard: Guard) -> dict[str, Any]:
    inputs = questions()
    fitted = small_fit(model, make_processor()).policy.directions.vectors
    return {
        "fitted": fitted[2:4, 0].tolist(),
        **{
            name: answered(each, model, inputs, **options)
            for name, (each, options) in variants(guard).items()
        },
    }


def given_differently(
    model: LlavaForConditionalGeneration, guard: Guard, rank: int
) -> dict[str, Any]:
    """What one process is told differs from what the other one is."""
    processor = make_processor()
    same, own = (ask(processor, [QUESTIONS[each]]) for each in (0, rank))
    torn = with_thresholds(guard, (-100.0, 100.0)[rank])

    def streamed(guard: Guard, inputs: dict[str, Tensor], **options: Any) -> dict[str, Any]:
        watch = Watch()
        with guard.attach(model):
            set_seed(rank)
            raised = error(lambda: model.generate(**inputs, **options, streamer=watch))
        return {"error": raised, "tokens": watch.streamed}

    return {
        "other requests": streamed(guard, own, **GREEDY),
        "other seeds": streamed(guard, same, **SAMPLED),
        "other decisions": streamed(torn, same, **GREEDY),
    }


def scattered(model: LlavaForConditionalGeneration, guard: Guard, rank: int) -> dict[str, Any]:
    inputs = questions()
    before = model.generate(**inputs, **GREEDY)
    scatter_tokens(model, rank)
    after = model.generate(**inputs, **GREEDY)
    return {
        "works": torch.equal(before, after),
        "attach": error(lambda: guard.attach(model).__enter__()),
    }


def sequence(folder: Path, guard: Guard) -> dict[str, Any]:
    model = load(folder, tp_size=WORLD, tp_plan={NORMS: "sequence_parallel"})
    return {
        "attach": error(lambda: guard.attach(model)),
        "fit": error(lambda: small_fit(model, make_processor())),
    }


def other_weights(model: Any, guard: Guard, rank: int) -> dict[str, Any]:
    """One process's part of a weight is written to, inside the block and before it."""
    inputs = ask(make_processor(), QUESTIONS[:1])
    weight = model.model.language_model.layers[1].self_attn.o_proj.weight
    with guard.attach(model):
        if rank == 1:
            with torch.no_grad():
                weight.to_local().mul_(3.0)
        inside = error(lambda: model.generate(**inputs, **GREEDY))
    return {"inside": inside, "attach": error(lambda: guard.attach(model).__enter__())}


def experts(folder: Path) -> Answered:
    model = load(folder, tp_size=WORLD, ep_size=WORLD)
    guard = Guard.from_pretrained(folder / "guard")
    return answered(guard, model, torch.load(folder / "inputs.pt"), **GREEDY)


def error(act: Callable[[], Any]) -> str | None:
    """What it refuses; None where it does not."""
    try:
        act()
    except SafeguardError as raised:
        return str(raised)
    return None
