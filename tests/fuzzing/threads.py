"""Threads that enter and leave a guarded block at random moments."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from fuzzing.cases import ANSWER, END, IMAGE, USER, Guarding, guardings, padded, pixels_of, words
from fuzzing.check import guard_of, hooked
from fuzzing.options import some
from support.observe import Model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.edits import Refuse
from vlm_safeguard.policy.span import Span

TOKENS = 6
STOPS = ("stopped", "waited for", "from within")


@dataclass(frozen=True)
class Threads:
    """Calls of several threads, and when the block is left.

    Attributes:
        prompts: of each thread, a batch.
        begins: of each thread, seconds after which it calls.
        leaves: seconds after which the block is left.
        pause: seconds that each token takes.
        how: whether leaving stops runs or waits for them, or a run itself leaves.
    """

    guarding: Guarding
    prompts: list[list[list[int]]]
    begins: list[float]
    leaves: float
    pause: float
    how: str


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    image = IMAGE if draw(st.booleans()) else []
    return [*USER, *image, *draw(words), *END, *ANSWER]


moments = some(0.0, 0.001, 0.004, 0.01, 0.03, 0.06, 0.1)


# Whose edit every token of the answer needs, so that one without it shows.
held = st.builds(
    Guarding, some((1, 2, 3, 4)), some(Refuse(span=Span.ANSWER)), some("open"), some(False)
)


@st.composite
def thread_cases(draw: st.DrawFn) -> Threads:
    count = draw(st.integers(1, 3))
    batch = st.lists(prompts(), min_size=1, max_size=2)
    return Threads(
        guarding=draw(guardings | held),
        prompts=[draw(batch) for _ in range(count)],
        begins=[draw(moments) for _ in range(count)],
        leaves=draw(moments),
        pause=draw(some(0.0, 0.002, 0.01)),
        how=draw(some(*STOPS)),
    )


class Slow(BaseStreamer):
    """Keeps the tokens it is given, each of which takes a while."""

    def __init__(self, pause: float) -> None:
        self.tokens: list[int] = []
        self.pause = pause
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then every new token."""
        if self._prompt_seen:
            self.tokens += value.flatten().tolist()
        self._prompt_seen = True
        time.sleep(self.pause)

    def end(self) -> None:
        """Nothing is kept back."""


class Caller(threading.Thread):
    """One thread's call, and what came of it."""

    def __init__(self, generate: Any, batch: list[list[int]], begins: float, pause: float) -> None:
        super().__init__(daemon=True)
        self.generate, self.batch, self.begins = generate, batch, begins
        self.streamer = Slow(pause)
        self.tokens: list[list[int]] = []  # that were chosen, of each row
        self.sequences: list[list[int]] = []
        self.width = 0
        self.error: Exception | None = None
        self.leave: Any = None  # called at the second step, if given

    def watch(self, ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor."""
        self.tokens = ids.tolist()
        if self.leave is not None and ids.shape[1] == self.width + 2:
            leave, self.leave = self.leave, None
            leave()
        return scores

    def run(self) -> None:
        """Call."""
        ids, mask = padded(self.batch, 0)
        self.width = ids.shape[1]
        time.sleep(self.begins)
        pixels = pixels_of(self.batch)
        options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
        if len(ids) == 1:
            options["streamer"] = self.streamer
        try:
            output = self.generate(
                input_ids=ids,
                attention_mask=mask,
                **({} if pixels is None else {"pixel_values": pixels}),
                logits_processor=[self.watch],
                **options,
            )
            self.sequences = output.tolist()
        except Exception as error:
            self.error = error


def check_threads(case: Threads, model: Model, fitted: Guard) -> str:
    """Run a case.

    Returns:
        What came of it, in a few words.

    Raises:
        AssertionError: something does not hold.
    """
    guard = guard_of(case.guarding, fitted)
    state = hooked(model)
    with guard.attach(model):
        expected = [_run(model.generate, batch) for batch in case.prompts]
    attachment = guard.attach(model, wait=case.how == "waited for")
    attachment.__enter__()
    callers = [
        Caller(model.generate, batch, begins, case.pause)  # the guarded one, whenever it begins
        for batch, begins in zip(case.prompts, case.begins, strict=True)
    ]
    if case.how == "from within":
        callers[0].leave = lambda: attachment.__exit__(None, None, None)
    for caller in callers:
        caller.start()
    if case.how != "from within":
        time.sleep(case.leaves)
        attachment.__exit__(None, None, None)
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive(), "a thread waits for ever"
    assert hooked(model) == state, "leaving the block did not leave the model as it was"
    for caller, tokens in zip(callers, expected, strict=True):
        _check_caller(caller, tokens, guard.policy.edits)
    stopped = sum(caller.error is not None for caller in callers)
    return f"threads, {case.how}: {stopped} of {len(callers)} stopped"


def _run(generate: Any, batch: list[list[int]]) -> list[list[int]]:
    caller = Caller(generate, batch, 0.0, 0.0)
    caller.run()
    assert caller.error is None, f"alone: {caller.error!r}"
    return caller.sequences


def _check_caller(caller: Caller, expected: list[list[int]], edits: bool) -> None:
    """It has the guarded tokens, all of them or as many as it was let have.

    Args:
        edits: whether no row is run whose answer is dropped, for one from its text alone.
    """
    if caller.error is None:
        assert caller.sequences == expected, "other tokens than alone"
    else:
        assert isinstance(caller.error, SafeguardError), f"a bare error: {caller.error!r}"
    for row in caller.tokens if edits else []:
        guarded = any(row == whole[: len(row)] for whole in expected)
        assert guarded, "a token that is not the guarded one's"
    streamed = caller.streamer.tokens
    assert streamed == expected[0][caller.width :][: len(streamed)], "an unguarded token streamed"
