"""A caller's own functions in the runs that the guard makes: they see what the caller gave."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class WholePrompts:
    """Rows of a run on texts as their callers know them: the whole prompt, then the answer.

    Attributes:
        prompts: (requests, tokens) ids.
        numbers: of these prompts in the batch.
        text: tokens of the run's prompts without what the answers begin with.
    """

    prompts: torch.Tensor
    numbers: tuple[int, ...]
    text: int

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens) of (rows, tokens) ids of the run."""
        prompts = self.prompts.repeat_interleave(len(ids) // len(self.prompts), dim=0)
        return torch.cat([prompts.to(ids.device), ids[:, self.text :]], dim=1)


class ByPrompt(StoppingCriteria):
    """Looks at answers by the prompts that they answer, in each run that the guard makes of them.

    Only answers that are given are looked at: none beside an image that the guard gives from the
    text.
    """

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """(rows,) bool: which answers end here, where there is a row for each prompt."""
        return self.ends(input_ids, range(len(input_ids)))

    @abstractmethod
    def ends(self, ids: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
        """(rows,) bool: which answers end here.

        Args:
            ids: (rows, tokens) whole prompts as `generate` was given them, and the answers.
            prompts: the number of each row's prompt.
        """


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
        ids = self._whole(input_ids)
        if not isinstance(self._own, ByPrompt):
            return self._own(ids, scores, **options)
        numbers = self._whole.numbers
        copies = len(ids) // len(numbers)
        return self._own.ends(ids, [numbers[row // copies] for row in range(len(ids))])


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


class HeldStreamer:
    """The caller's streamer, which is given the prompt together with the first token behind it.

    So it is given nothing by a run that is left before there is a token.
    """

    def __init__(self, own: BaseStreamer) -> None:
        self._own = own
        self._prompt: torch.Tensor | None = None
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then one token after the other."""
        if self._begun:
            self._own.put(value)
        elif self._prompt is None:
            self._prompt = value
        else:
            self._own.put(self._prompt)
            self._own.put(value)
            self._begun = True

    def end(self) -> None:
        """Nothing more comes."""
        self._own.end()


def beside_images(
    criteria: Sequence[Any], is_open: Callable[[], torch.Tensor]
) -> StoppingCriteriaList:
    """The caller's criteria, in a run whose answers to requests with an open gate nobody reads.

    Args:
        is_open: (requests,) bool.
    """
    own = [_OfClosed(each, is_open) if isinstance(each, ByPrompt) else each for each in criteria]
    return StoppingCriteriaList([*own, _LeavesOpen(is_open)])


class _OfClosed(StoppingCriteria):
    """Shows a caller's criterion the answers that are read."""

    def __init__(self, own: ByPrompt, is_open: Callable[[], torch.Tensor]) -> None:
        self._own, self._is_open = own, is_open

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """(rows,) bool: which answers end here."""
        is_open = self._is_open()
        copies = len(input_ids) // len(is_open)
        closed = rows_of((~is_open).nonzero()[:, 0].tolist(), copies)
        ends = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if closed:
            ends[closed] = self._own.ends(input_ids[closed], [row // copies for row in closed])
        return ends


class _LeavesOpen(StoppingCriteria):
    """Ends the answers beside images of requests whose gate is open."""

    def __init__(self, is_open: Callable[[], torch.Tensor]) -> None:
        self._is_open = is_open

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """(rows,) bool: which answers end here."""
        is_open = self._is_open().to(input_ids.device)
        return is_open.repeat_interleave(len(input_ids) // len(is_open))


def rows_of(requests: Sequence[int], copies: int) -> list[int]:
    """Where each request's answers stand in an output."""
    return [request * copies + copy for request in requests for copy in range(copies)]
