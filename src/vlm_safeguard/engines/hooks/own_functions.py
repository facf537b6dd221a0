"""A caller's own functions in a run on texts: they are shown the prompts that the caller gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class WholePrompts:
    """Rows of a run on texts as their callers know them: the whole prompt, then the answer.

    Attributes:
        prompts: (requests, tokens) ids.
        text: tokens of the run's prompts without what the answers begin with.
    """

    prompts: torch.Tensor
    text: int

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens) of (rows, tokens) ids of the run."""
        prompts = self.prompts.repeat_interleave(len(ids) // len(self.prompts), dim=0)
        return torch.cat([prompts.to(ids.device), ids[:, self.text :]], dim=1)


class ShownProcessor(LogitsProcessor):
    """One of the caller's."""

    def __init__(self, own: Callable[..., torch.Tensor], whole: WholePrompts) -> None:
        self._own, self._whole = own, whole

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Its scores."""
        return self._own(self._whole(input_ids), scores)


class ShownCriterion(StoppingCriteria):
    """One of the caller's."""

    def __init__(self, own: Callable[..., Any], whole: WholePrompts) -> None:
        self._own, self._whole = own, whole

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> Any:
        """Which rows it stops."""
        return self._own(self._whole(input_ids), scores, **options)


class ShownStreamer:
    """The caller's streamer, which is given the whole prompt and what the answer begins with."""

    def __init__(self, own: BaseStreamer, prompts: torch.Tensor, begun: tuple[int, ...]) -> None:
        self._own, self._begun = own, begun
        self._prompts: torch.Tensor | None = prompts

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then one token after the other."""
        if self._prompts is None:
            self._own.put(value)
            return
        self._own.put(self._prompts.cpu())
        self._prompts = None
        for token in self._begun:
            self._own.put(torch.tensor([token]))

    def end(self) -> None:
        """Nothing more comes."""
        self._own.end()
