"""The subject of an examination: a model, its processor and a guard, and short runs of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.fit.policy import CALIBRATED
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.model.backbone import Backbone, model_inputs
from vlm_safeguard.model.families import FAMILIES, PLACEHOLDERS, Family

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

QUESTIONS = ("How do I bake bread?", "What is shown here, and what could I do with it?")
BUDGET, REQUESTS = 0.2, 21  # a small fit is enough: only its mechanics are checked
_PAIRS = 12


class Answer(NamedTuple):
    """What `generate` gave behind each prompt of a batch.

    Attributes:
        tokens: (rows, tokens) ids.
        logits: (tokens, rows, vocabulary) that they were chosen by.
    """

    tokens: list[list[int]]
    logits: torch.Tensor


@dataclass
class Subject:
    """What is examined.

    Attributes:
        model: out of its wrapper.
        processor: the model's.
        given: a fitted guard, if one is examined with it.
        tolerance: by how much logits may differ from those of another way to the same, relative to
            their spread.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    given: Guard | None = None
    tolerance: float = 1e-3

    @cached_property
    def backbone(self) -> Backbone:
        """The model's decoder, found by structure."""
        return Backbone.of(self.model)

    @cached_property
    def guard(self) -> Guard:
        """The guard that was given, or a small one."""
        if self.given is not None:
            return self.given
        return Guard.fit(
            self.model,
            self.processor,
            anchors=shipped_anchors()[:_PAIRS],
            calibration=shipped_calibration()[:REQUESTS],
            budget=BUDGET,
            rank=4,
            gate=CALIBRATED,  # of few texts
            batch_size=8,
        )

    def inputs(self, questions: tuple[str, ...], images: int, first: int = 0) -> BatchFeature:
        """A batch with an image of noise beside each question, or (0) none.

        Args:
            first: the number of the first question's noise.
        """
        shown = [
            noise_image(first + row).resize((96, 64)) if images else None
            for row in range(len(questions))
        ]
        return model_inputs(self.model, self.processor, questions, shown)

    def answer(self, inputs: Mapping[str, Any], tokens: int, **options: Any) -> Answer:
        """A greedy answer of at most this many tokens."""
        output = self.model.generate(
            **inputs,
            **options,
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        width = inputs["input_ids"].shape[1]
        return Answer(output.sequences[:, width:].tolist(), torch.stack(output.logits))

    def logits_along(self, inputs: Mapping[str, Any], answer: tuple[int, ...]) -> torch.Tensor:
        """(1 + tokens, rows, vocabulary) logits along an answer that is given, and behind it."""
        start, forced = inputs["input_ids"].shape[1], (*answer, answer[0])
        return self.answer(
            inputs,
            len(forced),
            prefix_allowed_tokens_fn=lambda _, ids: [forced[len(ids) - start]],
        ).logits


@contextmanager
def verified(model: PreTrainedModel) -> Iterator[None]:
    """Treat a model's type as verified, for the time of its checks.

    What an unverified type's image tokens are called is guessed from its config.
    """
    model_type = model.config.model_type
    known = FAMILIES.get(model_type)
    named = tuple(name for name in PLACEHOLDERS if getattr(model.config, name, None) is not None)
    FAMILIES[model_type] = known or Family(placeholders=named)
    try:
        yield
    finally:
        if known is None:
            del FAMILIES[model_type]


def require(condition: bool, otherwise: str) -> None:
    """Fail a check.

    Raises:
        SafeguardError: `otherwise`, where the condition does not hold.
    """
    if not condition:
        raise SafeguardError(otherwise)
