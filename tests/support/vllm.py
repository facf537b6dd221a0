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
    logprobs: int | None = None
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
    pairs = zip(logits, ids[1:], strict=False)
    return [None, *(_entry(each, token, likeliest) for each, token in pairs)]


def next_entry(logits: torch.Tensor, likeliest: int) -> dict[int, Any]:
    """vLLM's `logprobs` of the token that it takes behind a prompt with these logits."""
    return _entry(logits[-1], int(logits[-1].argmax()), likeliest)


def _entry(logits: torch.Tensor, token: int, likeliest: int) -> dict[int, Any]:
    logprobs = logits.log_softmax(-1)
    shown = (token, *logprobs.topk(likeliest).indices.tolist())
    return {each: SimpleNamespace(logprob=float(logprobs[each])) for each in shown}


@dataclass
class Engine:
    """An engine that answers with three outputs.

    Attributes:
        logits: gives those of a question, (tokens, vocabulary), by its token ids; None where its
            log-probabilities get lost.
        lost: how many of the last words' log-probabilities get lost.
        ends: how questions end.
        failure: raised for questions, if any.
        delay: seconds before a question's output.
        states: gives what a worker reads of a request, by its token ids and mark; None where no
            worker reads.
        edited: gives what a worker says that it edited, by the request's mark.
        given: (request id, kind of its prompt) of all that it was given.
        called: methods of workers, and among them ids of requests, as they came.
        aborted: ids of those that were not read to their end.
    """

    logits: Callable[[list[int]], torch.Tensor | None]
    lost: int = 0
    ends: str = "length"
    failure: Exception | None = None
    delay: float = 0.0
    states: Callable[[list[int], dict[str, Any]], Any] | None = None
    edited: Callable[[dict[str, Any]], Any] | None = None
    given: list[tuple[str, str]] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    is_running: bool = True

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """As `AsyncLLM.generate`."""
        self.given.append((request_id, prompt["type"]))
        self.called.append(request_id)
        self.prompts.append(prompt)
        self.params.append(params)
        mark = (params.extra_args or {}).get("vlm_safeguard", {})
        if self.states is not None and "position" in mark:
            self.kept[mark["name"]] = self.states(prompt["prompt_token_ids"], mark)
        if self.edited is not None and "edit" in mark:
            self.kept[mark["name"]] = self.edited(mark)
        try:
            if not params.detokenize:
                await asyncio.sleep(self.delay)
                if self.failure is not None:
                    raise self.failure
                yield self._read(prompt["prompt_token_ids"], params)
                return
            for number in range(3):
                await asyncio.sleep(0)
                yield SimpleNamespace(kind=prompt["type"], number=number)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    def _read(self, ids: list[int], params: SamplingParams) -> Any:
        """The output to a question."""
        logits, behind, within = self.logits(ids), None, None
        if logits is not None and params.logprobs is not None:
            behind = [next_entry(logits, params.logprobs)]
        if logits is not None and params.prompt_logprobs is not None:
            within = entries_of(logits, ids, params.prompt_logprobs)
            within = within[: len(within) - self.lost]
        output = SimpleNamespace(finish_reason=self.ends, token_ids=[0], logprobs=behind)
        return SimpleNamespace(outputs=[output], prompt_logprobs=within)

    async def collective_rpc(self, method: str, args: tuple[Any]) -> list[Any]:
        """Two workers of tensor parallelism."""
        self.called.append(method)
        if method == "hold":
            await asyncio.sleep(args[0])
            return [None, None]
        assert method in ("take_states", "take_edited")
        taken = [self.kept.pop(name, None) for name in args[0]]
        return [taken, taken]

    async def abort(self, ids: list[str]) -> None:
        """As `AsyncLLM.abort`."""
        self.aborted += ids

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
