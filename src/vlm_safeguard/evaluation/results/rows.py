"""The rows of `results.json`: a share or mean with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from vlm_safeguard.defences.defence import until_end
from vlm_safeguard.engines.hooks.reader import TextReadings
from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.statistics import Estimate, share
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.policy.receipt import Receipt

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.guard import Guard


Metric = Literal[
    "refusal",
    "accuracy",
    "attack_success",
    "unreadable",
    "perplexity",
    "kl",
    "tokens",
    "seconds",
]
#: The metrics that are shares of answers.
SHARES: tuple[Metric, ...] = ("refusal", "accuracy", "attack_success", "unreadable")
#: The model as it is, the guard as it is fitted, and a request without an image.
BASELINE, DEFAULT, TEXT = "none", "default", "text"


class Row(BaseModel):
    """One cell of a results table.

    Shares (`SHARES`) are in 0–1 with a 95 % Wilson interval. The other metrics have a 95 %
    bootstrap interval and units of their own: perplexity; KL in nats a token; new tokens and
    seconds an answer.

    Attributes:
        prompts: the kind of request.
        n: answers that the value is a share or mean of.
        benchmark: where the prompts come from; None for the demo's own.
        judge: whose verdicts were counted; None where none was needed, and for the demo's.
    """

    model_config = ConfigDict(frozen=True)

    defence: str
    condition: str
    prompts: Kind
    metric: Metric
    benchmark: str | None = None
    judge: str | None = None
    n: int
    value: float
    low: float
    high: float

    @property
    def benchmark_name(self) -> str:
        """What it was measured on; the demo's rows have no benchmark's name."""
        return self.benchmark or f"{self.prompts} prompts"

    @classmethod
    def count(cls, outcomes: Sequence[bool], **names: Any) -> Row:
        """The row of a list of yes/no outcomes."""
        return cls.of(share(outcomes), **names)

    @classmethod
    def of(cls, estimate: Estimate, **names: Any) -> Row:
        """The row of a share, a mean, a ratio or a perplexity."""
        return cls(**asdict(estimate), **names)


@dataclass
class Replies:
    """What a model answered under one defence, request by request.

    Attributes:
        texts: the decoded replies.
        tokens: their new token ids, one dimension each, up to the end of the answer.
        receipts: one for each request; empty without a guard.
    """

    texts: list[str]
    tokens: list[torch.Tensor]
    receipts: list[Receipt]


@torch.inference_mode()
def generate_replies(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[str],
    images: Sequence[Image | None],
    guards: Mapping[str, Guard | None],
    *,
    max_new_tokens: int,
    batch_size: int,
    after_batch: Callable[[str, int], None] = lambda name, done: None,
) -> dict[str, Replies]:
    """Greedy replies to requests, each with its image if it has one, under several defences.

    The text-only pass is made once for all of them.

    Args:
        guards: by name, the guard that is attached while generating; None for the model as it is.
        after_batch: called with a guard's name and the number of requests it has just done.
    """
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i]), requests[i]))
    found: dict[str, dict[int, tuple[str, torch.Tensor, Receipt | None]]] = {n: {} for n in guards}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = model_inputs(
            model, processor, [requests[i] for i in batch], [images[i] for i in batch]
        )
        readings = TextReadings()
        for name, guard in guards.items():
            with guard.attach(model, readings=readings) if guard is not None else nullcontext():
                output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            receipts = [None] * len(batch) if guard is None else guard.receipts
            for i, row, receipt in zip(batch, output.cpu(), receipts, strict=True):
                tokens = until_end(model, row[inputs["input_ids"].shape[1] :])
                text = processor.decode(tokens, skip_special_tokens=True)
                found[name][i] = (text, tokens, receipt)
            after_batch(name, len(batch))
    rows = range(len(requests))
    return {
        name: Replies(
            texts=[replies[i][0] for i in rows],
            tokens=[replies[i][1] for i in rows],
            receipts=[receipt for i in rows if (receipt := replies[i][2]) is not None],
        )
        for name, replies in found.items()
    }
