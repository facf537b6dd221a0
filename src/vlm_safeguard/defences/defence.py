"""The one door that everything compared goes through: requests and images in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vlm_safeguard.backbone import model_inputs

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.guard import Guard


class Defence(Protocol):
    """A way of answering one batch of requests with a model, greedily."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def generate(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        requests: Sequence[str],
        images: Sequence[Image | None],
        **options: Any,
    ) -> list[str]:
        """One answer for each request.

        Args:
            model: a vision-language model in eval mode, to which no guard is attached.
            images: the picture that goes with each request; None for text alone.
            options: of the model's `generate`, for the answers: `max_new_tokens` and the like.

        Raises:
            SafeguardError: the model or the processor cannot be used.
        """


@dataclass(frozen=True)
class Undefended:
    """The model as it is."""

    name: str = "none"

    def generate(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        requests: Sequence[str],
        images: Sequence[Image | None],
        **options: Any,
    ) -> list[str]:
        """See `Defence.generate`."""
        return answers(model, processor, requests, images, **options)


@dataclass(frozen=True)
class Guarded:
    """A guard, attached for each batch."""

    guard: Guard
    name: str = "guard"

    def generate(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        requests: Sequence[str],
        images: Sequence[Image | None],
        **options: Any,
    ) -> list[str]:
        """See `Defence.generate`."""
        with self.guard.attach(model):
            return answers(model, processor, requests, images, **options)


def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[str],
    images: Sequence[Image | None],
    **options: Any,
) -> list[str]:
    """Greedy answers to one batch, whatever is attached to the model."""
    inputs = model_inputs(model, processor, requests, images)
    output = model.generate(**inputs, do_sample=False, **options)
    found: list[str] = processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return found
