"""vLLM's engine client, wrapped: no request with media is answered before its verdict.

The text-only view of a request goes in as a request of its own. A closed gate is answered by the
request as it came; an open one by the text-only view, with the same sampling parameters, or, where
the policy edits, by the request as it came, whose states workers edit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch

from vlm_safeguard.engines.vllm import question
from vlm_safeguard.engines.vllm.gate import check_order
from vlm_safeguard.engines.vllm.ledger import note
from vlm_safeguard.engines.vllm.marks import Mark
from vlm_safeguard.engines.vllm.order import Order
from vlm_safeguard.engines.vllm.verdict import Answer, Judge
from vlm_safeguard.policy.request import Request

#: What vLLM's server asks of an engine beside answers. All else is refused: it may answer, or
#: change the model.
PASSED = frozenset(
    {
        *("vllm_config", "model_config", "renderer", "input_processor", "tokenizer"),
        *("is_running", "is_stopped", "errored", "dead_error", "check_health", "do_log_stats"),
        *("is_tracing_enabled", "check_admission", "shutdown"),
        *("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache", "log_stats"),
    }
)
#: Options of a request that its question shares.
_SHARED = ("trace_headers", "priority", "data_parallel_rank")
_HELD = 0.002  # seconds that an idle engine waits for a request and its questions to arrive

#: Of each worker, what it read under some names; None where it read nothing.
Shown = list[list[Any]]


class GuardedClient:
    """In the place of an engine client of vLLM."""

    def __init__(self, engine: Any, judge: Judge, order: Order) -> None:
        """Around `engine`, whose configuration was checked.

        Raises:
            SafeguardError: requests would be begun before it is known how they are edited.
        """
        check_order(judge.policy, order)
        self._engine, self._judge, self._order = engine, judge, order
        self._running = 0  # requests that are being answered

    def __getattr__(self, name: str) -> Any:
        """What does not answer is the engine's own."""
        if name in PASSED:
            return getattr(self._engine, name)
        raise AttributeError(f"'{name}' of vLLM's engine is not guarded, so it cannot be used")

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Answers, of all that the engine can do: the rest would not be guarded."""
        tasks = await self._engine.get_supported_tasks()
        return tuple(task for task in tasks if task == "generate")

    async def abort(self, request_id: str | Iterable[str], **options: Any) -> None:
        """Abort requests, and their questions."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        parts = self._judge.parts
        every = (name for each in ids for name in (each, *question_ids(each, parts)))
        await self._engine.abort(list(every), **options)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Answer a rendered request.

        Raises:
            ValueError: it cannot be guarded.
            NotReadError: the engine did not read its text.
            NotEditedError: it is open, and the engine did not edit it as planned.
        """
        judge, place = self._judge, note(self._judge.policy)
        early, first = None, None
        multimodal = isinstance(prompt, dict) and prompt.get("type") == "multimodal"
        mark = judge.media_mark() if multimodal else judge.mark()
        params = question.marked(sampling_params, mark)
        answer = self._engine.generate(prompt, params, request_id, **options)
        self._running += 1
        try:
            sent = answer if multimodal and self._order is Order.TOGETHER else None
            request = await self._read(prompt, request_id, options, sent)
            if multimodal:
                asked = question.Question.all_about(judge, request)
                shared = {name: x for name, x in options.items() if name in _SHARED}
                idle = self._running == 1 and bool(judge.layers)
                if idle and self._order is not Order.FIRST and not judge.policy.edits:
                    early = asyncio.ensure_future(_held(self._engine, asked))
                if early is not None or self._order is Order.TOGETHER:
                    first = asyncio.ensure_future(anext(answer))
                given = await read(self._engine, asked, request_id, prompt, early, **shared)
                receipt = asked[0].receipt(given)
                if judge.awaits_image(receipt):
                    first = first or asyncio.ensure_future(anext(answer))
                    await first
                    states = await take(self._engine, judge, mark)
                    receipt = asked[0].receipt(given, states)
            else:
                receipt = judge.receipt(request, ())
            place.receipt = receipt
            if receipt.guarded:
                await _end(answer, first)
                first = None
                if judge.policy.edits:
                    mark = asked[0].edit_mark(given[0], receipt.layers)
                    answer = self._edited(prompt, sampling_params, request_id, mark, options)
                else:
                    options.pop("prompt_text", None)
                    text = question.tokens(list(request.text), prompt)
                    params = question.answer_params(judge, sampling_params)
                    answer = self._engine.generate(text, params, request_id, **options)
            elif first is not None:
                yield await first
            async for output in answer:
                yield output
        finally:
            self._running -= 1
            if early is not None:
                early.cancel()
            await _end(answer, first)

    async def _edited(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        mark: Mark,
        options: dict[str, Any],
    ) -> AsyncGenerator[Any, None]:
        """Answer a request as it came, edited; nothing is given before workers say that it was.

        Raises:
            NotEditedError: it was not edited as planned.
        """
        engine, checked = self._engine, False
        whole, params = question.salted(prompt, mark), mark.on(sampling_params)
        async with aclosing(engine.generate(whole, params, request_id, **options)) as answer:
            async for output in answer:
                if not checked:
                    shown = await engine.collective_rpc("take_edited", args=([mark.name],))
                    question.check_edits(mark, shown)
                    checked = True
                yield output

    async def _read(
        self,
        prompt: Any,
        request_id: str,
        options: dict[str, Any],
        sent: AsyncGenerator[Any, None] | None,
    ) -> Request:
        """The request; one that is refused is first `sent` to the engine, where images are cached.

        By rendering, vLLM's front has noted that the engine has the request's images: were they
        dropped on the way, the next request with one of them would fail.
        """
        try:
            question.check_name(request_id)
            question.check_options(options)
            return question.read(self._judge, prompt)
        except ValueError:
            if sent is not None:
                await asyncio.wait({asyncio.ensure_future(anext(sent))})
            raise


async def read(
    engine: Any,
    asked: Sequence[question.Question],
    name: str,
    prompt: Any,
    early: Awaitable[Shown] | None = None,
    **options: Any,
) -> list[Answer]:
    """The engine's answers to questions about a rendered prompt, and to what is asked further.

    Args:
        name: by which they are told from others, and aborted with what they are about.
        early: what workers read of them, asked for before they are answered; it may lack some.

    Raises:
        NotReadError: it gave none to one of them.
    """
    ids = question_ids(name, len(asked))
    answers = await _ask(engine, asked, ids[: len(asked)], prompt, early, **options)
    more = [about.further(answer) for about, answer in zip(asked, answers, strict=True)]
    places = [place for place, each in enumerate(more) if each is not None]
    further = [each for each in more if each is not None]
    ids = [ids[len(asked) + place] for place in places]
    told = await _ask(engine, further, ids, prompt, None, **options)
    for place, each in zip(places, told, strict=True):
        answers[place] = replace(answers[place], words=each.words, said=each.said)
    return answers


async def _ask(
    engine: Any,
    asked: Sequence[question.Question],
    ids: Sequence[str],
    prompt: Any,
    early: Awaitable[Shown] | None,
    **options: Any,
) -> list[Answer]:
    """All at once; then what workers read of them."""

    async def last(about: question.Question, request_id: str) -> Any:
        output: Any = None
        given = engine.generate(
            question.tokens(about.prompt, prompt), about.params, request_id, **options
        )
        async with aclosing(given):
            async for each in given:
                output = each
        return output

    tasks = [asyncio.ensure_future(last(*each)) for each in zip(asked, ids, strict=True)]
    try:
        outputs = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # where one failed, the others are of no use
    shown = await _shown_of(engine, asked) if early is None else await early
    if early is not None and any(each is None for worker in shown for each in worker):
        pairs = zip(shown, await _shown_of(engine, asked), strict=True)
        shown = [[x or y for x, y in zip(*pair, strict=True)] for pair in pairs]
    return [
        about.answered(output, [worker[place : place + 1] for worker in shown])
        for place, (about, output) in enumerate(zip(asked, outputs, strict=True))
    ]


async def take(engine: Any, judge: Judge, mark: Mark | None) -> dict[int, torch.Tensor]:
    """The states that workers read of a request with this mark.

    Raises:
        NotReadError: they are not those that were to be read.
    """
    assert mark is not None, "a gate that reads states marks requests"
    names = [] if mark.name is None else [mark.name]
    return question.states_read(judge, mark, await _shown(engine, names))


async def _held(engine: Any, asked: Sequence[question.Question]) -> Shown:
    """What workers read of these questions, in the pass that comes next.

    The engine, which is idle, is held until a request and its questions are in its queue, so that
    one pass reads them all. While it makes that pass, it is asked what was read; once it has made
    it, it would go on with the request before it told.
    """
    await engine.collective_rpc("hold", args=(_HELD,))
    return await _shown_of(engine, asked)


async def _shown_of(engine: Any, asked: Sequence[question.Question]) -> Shown:
    return await _shown(engine, [name for about in asked for name in about.names])


async def _shown(engine: Any, names: Sequence[str]) -> Shown:
    """Of each worker, what it read under these names."""
    if not names:
        return []
    shown: Shown = await engine.collective_rpc("take_states", args=(list(names),))
    return shown


def question_ids(request_id: str, count: int) -> list[str]:
    """Of so many questions about a request; then of what is asked further about each."""
    ids = [f"{request_id}-guard-{number}" for number in range(count)]
    return [*ids, *(f"{each}-words" for each in ids)]


async def _end(answer: AsyncGenerator[Any, None], first: asyncio.Future[Any] | None) -> None:
    """End a request, wherever it is; the engine aborts what it was given."""
    if first is not None and not first.done():
        first.cancel()
        await asyncio.wait({first})
    await answer.aclose()
