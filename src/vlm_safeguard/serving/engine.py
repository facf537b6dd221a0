"""The generating thread: it owns the model, attaches the guard once, and gives batches their turns.

Nothing runs the model but this thread and the run that has its turn, and nothing in a request
reaches the guard.
"""

from __future__ import annotations

import gc
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from vlm_safeguard.engines.hooks.text_passes import TextReadings
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.backbone import input_device
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.answers import Answers
from vlm_safeguard.serving.errors import ApiError, going_down, guard_fault
from vlm_safeguard.serving.jobs import Decided, Job, Waiting
from vlm_safeguard.serving.logs import place_of
from vlm_safeguard.serving.messages import Conversation
from vlm_safeguard.serving.metrics import Metrics
from vlm_safeguard.serving.prompts import Writer
from vlm_safeguard.serving.runs import Run
from vlm_safeguard.serving.settings import ServeSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlm_safeguard.engines.hooks.attachment import Attachment

_log = logging.getLogger("vlm_safeguard.serving")
_LATELY = 8  # batches that the mean length of a batch is over, about

_CANARY = Conversation.model_validate(
    {"messages": [{"role": "user", "content": "What is this?"}]}
).with_image()


class Engine:
    """A guarded model in a thread of its own.

    Attributes:
        writer: writes prompts for it; None until it is ready.
        guard: what guards it; likewise.
        ready: whether the guard is attached and verified, and jobs are taken.
        healthy: whether the latest pass was guarded.
        faults: passes that failed so far.
        failure: why the thread ended, if it did not end as it should.
    """

    def __init__(
        self,
        settings: ServeSettings,
        load: Callable[[], tuple[VLM, Guard]],
        metrics: Metrics,
        when_over: Callable[[], None] = lambda: None,
    ) -> None:
        """Not started yet.

        Args:
            load: gives the model and its guard; called in the thread.
            when_over: called in the thread as it ends.
        """
        self._settings, self._load, self._metrics = settings, load, metrics
        self._when_over = when_over
        self._waiting = Waiting(settings.max_batch, settings.batch_wait)
        self._thread = threading.Thread(target=self._work, name="generating", daemon=True)
        self._begun: deque[Run] = deque()  # which stand still
        self._readings = TextReadings()  # of the batch that is judged
        self._seconds = 1.0  # of a batch, lately
        self.writer: Writer | None = None
        self.guard: Guard | None = None
        self.ready = self.healthy = False
        self.faults = 0
        self.failure: str | None = None

    def start(self) -> None:
        """Load, attach and begin to answer."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job done.

        Raises:
            ApiError: it is not ready.
        """
        if not self.ready:
            raise going_down()
        self._waiting.put(job)

    def close(self) -> None:
        """Take no more jobs."""
        self.ready = False
        self._waiting.close()

    def drain(self, seconds: float) -> None:
        """Take no more jobs, and wait for those that were taken."""
        self.close()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def waiting(self) -> int:
        """Jobs that are not begun."""
        return len(self._waiting)

    @property
    def wait(self) -> int:
        """Seconds after which there will be room, about."""
        batches = 1 + len(self._begun) + self.waiting / self._settings.max_batch
        return max(1, min(60, round(batches * self._seconds)))

    # --- in the thread ---

    def _work(self) -> None:
        try:
            vlm, guard = self._load()
            with guard.attach(vlm.model, readings=self._readings, wait=True) as attachment:
                self.writer = Writer(vlm, self._settings.max_prompt_tokens)
                self.guard = guard
                self._check(vlm, attachment, self.writer)
                self.ready = True
                _log.info("ready", extra={"policy": guard.policy.sha256()})
                self._take_turns(vlm, attachment, self.writer)
        except SafeguardError as error:
            self.failure = str(error)
        except Exception as error:  # whatever it is, nothing is generated after it
            self.failure = f"{type(error).__name__} at {place_of(error)}"
        finally:
            self.close()
            for run in self._begun:
                _fail(run.jobs, going_down())
            while jobs := self._waiting.batch(wait=True):
                _fail(jobs, going_down())
            self._when_over()

    def _take_turns(self, vlm: VLM, attachment: Attachment, writer: Writer) -> None:
        """Until nothing more comes: a new batch and the one that waits longest, in turns."""

        def have(run: Run) -> None:
            run.go_on()
            if not run.is_over:
                self._begun.append(run)
            elif not self._is_well(run):
                self._begun.extend(Run([job], run.generate) for job in _again(run))
                self._check_or_fail(vlm, attachment, writer)

        def generate(run: Run) -> None:
            self._generate(run, vlm, attachment, writer)

        while True:
            new = None
            if len(self._begun) < self._settings.max_begun:
                if jobs := self._waiting.batch(wait=not self._begun):
                    have(new := Run(jobs, generate))
                elif not self._begun:
                    return
            if self._begun and self._begun[0] is not new:
                have(self._begun.popleft())

    def _generate(self, run: Run, vlm: VLM, attachment: Attachment, writer: Writer) -> None:
        """Answer a batch under the guard, in the run's thread; of images, those that are closed."""
        try:
            if run.jobs[0].reads_images and attachment.policy.text_suffices:
                self._judge(run, attachment, writer)
            if run.jobs:
                self._answer(run, vlm, attachment, writer)
        finally:
            self._readings.clear()

    def _judge(self, run: Run, attachment: Attachment, writer: Writer) -> None:
        """Put those whose gate is open back among the jobs that are answered from texts."""
        judged, closed, opened = run.jobs, [], []
        prompts = writer.encode_ids([job.ids for job in judged], [()] * len(judged))
        for job, judgement in zip(judged, attachment.judge(**prompts), strict=True):
            if not job.limit:
                job.tell(Decided(judgement.receipt))
            elif judgement.receipt.guarded:
                job.opened = judgement
                opened.append(job)
            else:
                closed.append(job)
        run.jobs = closed
        self._waiting.put_back(opened)

    def _answer(self, run: Run, vlm: VLM, attachment: Attachment, writer: Writer) -> None:
        """One `generate`."""
        jobs, device = run.jobs, input_device(vlm.model)
        rows = [job for job in jobs for _ in range(job.count)]
        inputs: Any = (
            writer.encode([job.prompt for job in rows])
            if jobs[0].reads_images
            else writer.encode_ids([job.ids for job in rows], [job.beginning for job in rows])
        )

        def step() -> None:
            run.steps += 1
            if run.steps >= self._settings.turn and self._others_wait:
                with attachment.paused(), _own_dice(device):
                    run.stand_still()

        answers = Answers(
            jobs,
            vlm.tokenizer,
            inputs["input_ids"].shape[1],
            _end_tokens(vlm.model),
            lambda: attachment.receipts,
            step,
        )
        self._metrics.batch_answers.observe(len(rows))
        sampling = jobs[0].sampling
        with _own_dice(device):
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
            attachment.generate(
                **inputs,
                **sampling.options,
                max_new_tokens=max(1, *(job.limit - len(job.beginning) for job in jobs)),
                stopping_criteria=StoppingCriteriaList([answers]),
            )
        for answer in answers.rows:
            answer.cut()

    @property
    def _others_wait(self) -> bool:
        """Whether another batch than the one that runs can have a turn."""
        return bool(self._begun or (self.waiting and self._settings.max_begun > 1))

    def _is_well(self, run: Run) -> bool:
        """Whether a run that is over ended well; if not, it is seen."""
        self._seconds += (run.seconds - self._seconds) / _LATELY
        if run.error is None:
            self.healthy = True
            return True
        self.faults += 1
        self._metrics.faults.inc()
        _log.error("fault", extra=_facts(run.error))
        run.error = None  # with its frames, which hold the batch
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # it may have been out of memory
        return False

    def _check_or_fail(self, vlm: VLM, attachment: Attachment, writer: Writer) -> None:
        try:
            self._check(vlm, attachment, writer)
        except Exception as error:  # every request will fail so, until the process is restarted
            self.healthy = False
            _log.error("unguarded", extra=_facts(error))

    def _check(self, vlm: VLM, attachment: Attachment, writer: Writer) -> None:
        """Show that a request with an image is judged.

        Raises:
            Exception: it is not, or the pass failed.
        """
        inputs = writer.encode([writer.write(_CANARY, [blank_image()])])
        try:
            receipts = attachment.generate(**inputs, max_new_tokens=1, do_sample=False).receipts
        finally:
            self._readings.clear()  # or the next check would take them
        if not all(receipt.findings for receipt in receipts):
            raise SafeguardError("A request with an image was not judged, so nothing is served.")
        self.healthy = True


def _again(run: Run) -> list[Job]:
    """Jobs of a batch that failed which are tried by themselves, so that one harms no other.

    The others, of which something may have been sent, have failed.
    """
    again = [job for job in run.jobs if not job.begun and not job.cancelled]
    if len(run.jobs) == 1:
        again = []
    _fail([job for job in run.jobs if job not in again], guard_fault())
    return again


def _fail(jobs: Sequence[Job], error: ApiError) -> None:
    for job in jobs:
        if job.left:
            job.tell(error)


@contextmanager
def _own_dice(device: torch.device) -> Iterator[None]:
    """Random numbers from here on have no part in those that others draw."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _facts(error: BaseException) -> dict[str, str]:
    """What may be logged of an error: of ours its sentence, of others no word of theirs."""
    facts = {"kind": type(error).__name__, "place": place_of(error)}
    return facts | ({"reason": str(error)} if isinstance(error, SafeguardError) else {})
