"""A model and what writes for it, as one: a vision-language model, or a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_safeguard.model.backbone import Backbone, chat_inputs
from vlm_safeguard.model.conversation import tokenizer_of

if TYPE_CHECKING:
    from transformers import (
        BatchFeature,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

    from vlm_safeguard.model.conversation import Chat


@dataclass(frozen=True, eq=False)
class VLM:
    """A vision-language model in eval mode, and its processor."""

    model: PreTrainedModel
    processor: ProcessorMixin

    @property
    def backbone(self) -> Backbone:
        """Its language model; see `Backbone.of`, also for what is raised."""
        return Backbone.of(self.model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)

    def encode(self, chats: Sequence[Chat]) -> BatchFeature:
        """Conversations as a left-padded batch for `generate`, where the model wants it.

        Raises:
            SafeguardError: the processor cannot render one, or takes images for all or none.
        """
        return chat_inputs(self.model, self.processor, chats)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model in eval mode that takes no images, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """What writes and encodes its conversations: the tokenizer."""
        return self.tokenizer
