"""Running a model over prompts under a defence, and counting: the rows of `results.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from vlm_safeguard.backbone import render_chat
from vlm_safeguard.evaluation.metrics import wilson
from vlm_safeguard.receipt import Receipt

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.guard import Guard


class Row(BaseModel):
    """One cell of a results table; values in 0–1, interval 95 % Wilson."""

    model_config = ConfigDict(frozen=True)

    defence: str
    condition: str
    prompts: Literal["harmful", "harmless", "utility"]
    metric: Literal["refusal", "accuracy"]
    n: int
    value: float
    low: float
    high: float

    @classmethod
    def count(cls, outcomes: Sequence[bool], **names: Any) -> Row:
        """The row of a list of yes/no outcomes."""
        low, high = wilson(sum(outcomes), len(outcomes))
        return cls(n=len(outcomes), value=sum(outcomes) / len(outcomes), low=low, high=high,
                   **names)  # fmt: skip


class Results(BaseModel):
    """`results.json`, the format that the demo and the evaluation suite share."""

    format: int = 1
    model: str
    rows: list[Row]
    time_ratio: float
    details: dict[str, Any] = {}


@torch.inference_mode()
def generate_replies(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[str],
    images: Sequence[Image] | None,
    guard: Guard | None = None,
    *,
    max_new_tokens: int,
    batch_size: int,
    after_batch: Callable[[int], None] = lambda done: None,
) -> tuple[list[str], list[torch.Tensor], list[Receipt]]:
    """Greedy replies to requests, each with its image if there are any.

    Args:
        guard: attached while generating; None for the model as it is.
        after_batch: called with the number of requests just done.

    Returns:
        The replies, their new token ids, and the receipts (none without a guard).
    """
    order = sorted(range(len(requests)), key=lambda index: len(requests[index]))
    replies: dict[int, str] = {}
    tokens: dict[int, torch.Tensor] = {}
    receipts: dict[int, Receipt] = {}
    with guard.attach(model) if guard is not None else nullcontext():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = model_inputs(
                model,
                processor,
                [requests[index] for index in batch],
                None if images is None else [images[index] for index in batch],
            )
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :].cpu()
            decoded = processor.batch_decode(new, skip_special_tokens=True)
            for place, index in enumerate(batch):
                replies[index], tokens[index] = decoded[place], new[place]
                if guard is not None:
                    receipts[index] = guard.receipts[place]
            after_batch(len(batch))
    rows = range(len(requests))
    return (
        [replies[i] for i in rows],
        [tokens[i] for i in rows],
        [receipts[i] for i in rows] if receipts else [],
    )


def model_inputs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[str],
    images: Sequence[Image] | None,
) -> Any:
    """A left-padded batch, ready for `generate`, on the model's device."""
    prompts = [render_chat(processor, text, images=images is not None) for text in requests]
    given = {} if images is None else {"images": list(images)}
    inputs = processor(
        text=prompts, return_tensors="pt", padding=True, padding_side="left", **given
    )
    return inputs.to(model.device, model.dtype)
