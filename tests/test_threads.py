"""A guarded model under several threads: none runs unguarded, each call has its receipts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaProcessor, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from support.observe import Model, Watch, hooks
from support.reference import QUESTIONS, ask
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.gate import GATES

TOKENS = 24


class Pause(BaseStreamer):
    """Notes the tokens it is given, and waits at a chosen one until it is told to go on."""

    def __init__(self, pause_at: int) -> None:
        self.tokens: list[int] = []
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.ended = False
        self._pause_at = pause_at
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then every new token."""
        if self._prompt_seen:
            self.tokens += value.flatten().tolist()
        self._prompt_seen = True
        if len(self.tokens) == self._pause_at:
            self.reached.set()
            assert self.go_on.wait(60)

    def end(self) -> None:
        """That nothing more comes."""
        self.ended = True


class Run(threading.Thread):
    """A `generate` in a thread of its own, with what came of it."""

    def __init__(self, generate: Callable[..., Any], **options: Any) -> None:
        super().__init__(daemon=True)
        self._generate, self._options = generate, options
        self.output: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Keep the output or the error."""
        try:
            self.output = self._generate(**self._options)
        except BaseException as error:
            self.error = error


@pytest.fixture
def opened(guard: Guard) -> Guard:
    return guard.variant(layers=(1, 2, 3, 4), gate=GATES["open"])


@pytest.fixture
def inputs(processor: LlavaProcessor) -> dict[str, Tensor]:
    return ask(processor, QUESTIONS[:1])


OPTIONS: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}


def guarded(model: Model, guard: Guard, inputs: dict[str, Tensor]) -> list[int]:
    with guard.attach(model):
        out = model.generate(**inputs, **OPTIONS)
    answer: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


@pytest.mark.parametrize("pause_at", [0, 1, 7])
def test_leaving_the_block_stops_a_run_before_its_next_token(
    model: Model, opened: Guard, inputs: dict[str, Tensor], pause_at: int
) -> None:
    """Every token that came is the guarded answer's; the thread ends in an error."""
    expected = guarded(model, opened, inputs)
    state = hooks(model)
    streamer = Pause(pause_at)
    attachment = opened.attach(model)
    with attachment:
        run = Run(model.generate, **inputs, **OPTIONS, streamer=streamer)
        run.start()
        assert streamer.reached.wait(60)
        threading.Timer(0.2, streamer.go_on.set).start()  # once the block is being left
    run.join(60)
    assert isinstance(run.error, SafeguardError)
    assert run.output is None
    assert streamer.ended
    assert len(streamer.tokens) <= pause_at + 1
    assert streamer.tokens == expected[: len(streamer.tokens)]
    assert hooks(model) == state


def test_leaving_the_block_waits_for_a_run_if_told_to(
    model: Model, opened: Guard, inputs: dict[str, Tensor]
) -> None:
    expected = guarded(model, opened, inputs)
    streamer = Pause(2)
    with opened.attach(model, wait=True):
        run = Run(model.generate, **inputs, **OPTIONS, streamer=streamer)
        run.start()
        assert streamer.reached.wait(60)
        threading.Timer(0.2, streamer.go_on.set).start()
    assert run.error is None
    assert streamer.tokens == expected


def test_a_run_that_begins_once_the_block_is_left_does_not_run(
    model: Model, opened: Guard, inputs: dict[str, Tensor]
) -> None:
    """The thread was given the guarded `generate`, and got to it too late."""
    watch = Watch()
    with opened.attach(model):
        run = Run(model.generate, **inputs, **OPTIONS, logits_processor=[watch])
    run.start()
    run.join(60)
    assert isinstance(run.error, SafeguardError)
    assert watch.steps == 0


def test_a_run_that_waits_for_its_turn_when_the_block_is_left_does_not_run(
    model: Model, opened: Guard, inputs: dict[str, Tensor]
) -> None:
    first, watch = Pause(1), Watch()
    with opened.attach(model):
        running = Run(model.generate, **inputs, **OPTIONS, streamer=first)
        running.start()
        assert first.reached.wait(60)
        waiting = Run(model.generate, **inputs, **OPTIONS, logits_processor=[watch])
        waiting.start()
        threading.Timer(0.3, first.go_on.set).start()
    for run in (running, waiting):
        run.join(60)
        assert isinstance(run.error, SafeguardError)
    assert watch.steps == 0


def test_a_reader_of_a_streamer_does_not_wait_for_ever(
    model: Model, processor: LlavaProcessor, opened: Guard, inputs: dict[str, Tensor]
) -> None:
    streamer = TextIteratorStreamer(processor.tokenizer, timeout=60)
    with opened.attach(model):
        run = Run(model.generate, **inputs, **OPTIONS | {"max_new_tokens": 4000}, streamer=streamer)
        run.start()
        next(iter(streamer))
    list(streamer)  # would raise `Empty` if it were not ended
    run.join(60)
    assert isinstance(run.error, SafeguardError)


def test_leaving_from_within_a_run_stops_it(
    model: Model, opened: Guard, inputs: dict[str, Tensor]
) -> None:
    state = hooks(model)
    attachment = opened.attach(model)
    attachment.__enter__()
    watch = Watch()

    def leave(ids: Tensor, scores: Tensor) -> Tensor:
        if watch.steps == 2:
            attachment.__exit__(None, None, None)
        return scores

    with pytest.raises(SafeguardError, match="block was left"):
        model.generate(**inputs, **OPTIONS, logits_processor=[watch, leave])
    assert watch.steps == 2
    assert hooks(model) == state


def test_each_call_has_its_own_receipts(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    """Of as many rows, with as many tokens, as its own requests have, whatever runs beside it."""
    batches = [QUESTIONS[:1], QUESTIONS[:2], QUESTIONS[:3], QUESTIONS[1:2]] * 3
    with guard.attach(model) as attachment:

        def call(questions: tuple[str, ...]) -> tuple[list[int], Any, list[int]]:
            given = ask(processor, questions)
            output, receipts = attachment.generate(**given, max_new_tokens=3, do_sample=False)
            seen = [receipt.text_tokens for receipt in guard.receipts]
            return [receipt.text_tokens for receipt in receipts], output, seen

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(call, batches))
    for questions, (counts, output, seen) in zip(batches, results, strict=True):
        alone = ask(processor, questions, images=False)
        assert counts == seen == alone["attention_mask"].sum(1).tolist()
        with guard.attach(model):
            assert torch.equal(
                model.generate(**ask(processor, questions), max_new_tokens=3, do_sample=False),
                output,
            )


def test_a_forward_of_another_thread_waits_for_its_turn(
    model: Model, processor: LlavaProcessor, opened: Guard, inputs: dict[str, Tensor]
) -> None:
    """It is no pass of the answer that is being written."""
    streamer = Pause(1)
    other = ask(processor, QUESTIONS[2:3])
    with torch.no_grad(), opened.attach(model):
        expected = model(**other).logits
    with opened.attach(model, wait=True):
        run = Run(model.generate, **inputs, **OPTIONS, streamer=streamer)
        run.start()
        assert streamer.reached.wait(60)
        forward = Run(torch.no_grad()(model.__call__), **other)
        forward.start()
        streamer.go_on.set()
        forward.join(60)
    assert forward.error is None
    assert torch.equal(forward.output.logits, expected)
    assert streamer.tokens == guarded(model, opened, inputs)


def test_two_guards_cannot_be_attached_at_the_same_moment(model: Model, opened: Guard) -> None:
    victim = copy.deepcopy(model)
    state = hooks(victim)
    start = threading.Barrier(4)
    outcomes: list[str] = []
    leave = threading.Event()

    def attach() -> None:
        attachment = opened.variant().attach(victim)
        start.wait(60)
        try:
            with attachment:
                outcomes.append("attached")
                leave.wait(60)
        except SafeguardError as error:
            outcomes.append(str(error))
        if len(outcomes) == 4:
            leave.set()

    threads = [threading.Thread(target=attach, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(600):
        if len(outcomes) == 4:
            leave.set()
            break
        leave.wait(0.1)
    for thread in threads:
        thread.join(60)
    assert outcomes.count("attached") == 1
    assert sum("already attached" in outcome for outcome in outcomes) == 3
    assert hooks(victim) == state
