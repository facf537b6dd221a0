"""vLLM as its guard sees it: an engine that answers by rule, and writes down what it was given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

Entries = list[dict[int, Any] | None]


@dataclass
class SamplingParams:
    """Those of vLLM's that are used."""

    max_tokens: int = 16
    temperature: float = 1.0
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None
    structured_outputs: Any = None

    def clone(self) -> SamplingParams:
        """As vLLM's."""
        return replace(self)


def entries_of(logits: torch.Tensor, ids: Sequence[int], likeliest: int) -> Entries:
    """vLLM's `prompt_logprobs` of a prompt with these (tokens, vocabulary) logits."""
    logprobs = logits.log_softmax(-1)
    entries: Entries = [None]
    for place, token in enumerate(ids[1:]):
        top = logprobs[place].topk(likeliest).indices.tolist()
        entries.append(
            {t: SimpleNamespace(logprob=float(logprobs[place, t])) for t in (token, *top)}
        )
    return entries


@dataclass
class Engine:
    """An engine that answers with three outputs.

    Attributes:
        entries: gives the `prompt_logprobs` of a question, by its token ids.
        ends: how questions end.
        failure: raised for questions, if any.
        delay: seconds before a question's output.
        states: gives what a worker reads of a request, by its token ids and mark; None where no
            worker reads.
        edited: gives what a worker says that it edited, by the request's mark.
        given: (request id, kind of its prompt) of all that it was given.
        aborted: ids of those that were not read to their end.
    """

    entries: Callable[[list[int]], Entries | None]
    ends: str = "length"
    failure: Exception | None = None
    delay: float = 0.0
    states: Callable[[list[int], dict[str, Any]], Any] | None = None
    edited: Callable[[dict[str, Any]], Any] | None = None
    given: list[tuple[str, str]] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    is_running: bool = True

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As `AsyncLLM.generate`."""
        self.given.append((request_id, prompt["type"]))
        self.prompts.append(prompt)
        self.params.append(params)
        mark = (params.extra_args or {}).get("vlm_safeguard", {})
        if self.states is not None and "position" in mark:
            self.kept[mark["name"]] = self.states(prompt["prompt_token_ids"], mark)
        if self.edited is not None and "edit" in mark:
            self.kept[mark["name"]] = self.edited(mark)
        try:
            if params.skip_reading_prefix_cache:
                await asyncio.sleep(self.delay)
                if self.failure is not None:
                    raise self.failure
                yield SimpleNamespace(
                    outputs=[SimpleNamespace(finish_reason=self.ends, token_ids=[0])],
                    prompt_logprobs=self.entries(prompt["prompt_token_ids"]),
                )
                return
            for number in range(3):
                await asyncio.sleep(0)
                yield SimpleNamespace(kind=prompt["type"], number=number)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    async def collective_rpc(self, method: str, args: tuple[list[str]]) -> list[list[Any]]:
        """Two workers of tensor parallelism."""
        assert method in ("take_states", "take_edited")
        taken = [self.kept.pop(name, None) for name in args[0]]
        return [taken, taken]

    async def encode(self) -> None:
        """What the guard does not let through."""
        raise AssertionError

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """As `AsyncLLM` has it."""
        return ("generate", "transcription")


class Layer(torch.nn.Module):
    """As vLLM's: what it adds, and what it was added to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width))

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else hidden + residual
        return (residual @ self.weight).tanh(), residual
