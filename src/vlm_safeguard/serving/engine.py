"""The generating thread: it owns the model, attaches the guard once, and answers in batches.

Nothing outside this thread touches the model, and nothing in a request reaches the guard.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteriaList

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.backbone import input_device
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.serving.answers import Answers
from vlm_safeguard.serving.errors import going_down, guard_fault
from vlm_safeguard.serving.jobs import Job, Waiting
from vlm_safeguard.serving.logs import place_of
from vlm_safeguard.serving.messages import Conversation
from vlm_safeguard.serving.metrics import Metrics
from vlm_safeguard.serving.prompts import Writer
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
        batches = 1 + self.waiting / self._settings.max_batch
        return max(1, min(60, round(batches * self._seconds)))

    # --- in the thread ---

    def _work(self) -> None:
        try:
            vlm, guard = self._load()
            with guard.attach(vlm.model, wait=True) as attachment:
                self.writer = Writer(vlm, self._settings.max_prompt_tokens)
                self.guard = guard
                self._check(vlm, attachment, self.writer)
                self.ready = True
                _log.info("ready", extra={"policy": guard.policy.sha256()})
                while jobs := self._waiting.batch():
                    self._answer(vlm, attachment, self.writer, jobs)
        except SafeguardError as error:
            self.failure = str(error)
        except Exception as error:  # whatever it is, nothing is generated after it
            self.failure = f"{type(error).__name__} at {place_of(error)}"
        finally:
            self.close()
            while jobs := self._waiting.batch():
                for job in jobs:
                    job.tell(going_down())
            self._when_over()

    def _answer(
        self, vlm: VLM, attachment: Attachment, writer: Writer, jobs: Sequence[Job]
    ) -> None:
        """Answer a batch; where that fails, each job by itself, so that one harms no other."""
        if self._is_done(vlm, attachment, writer, jobs):
            return
        for job in jobs:
            alone = len(jobs) > 1 and not job.begun and not job.cancelled
            if job.left and not (alone and self._is_done(vlm, attachment, writer, [job])):
                job.tell(guard_fault())
        try:
            self._check(vlm, attachment, writer)
        except Exception as error:  # every request will fail so, until the process is restarted
            self.healthy = False
            _log.error("unguarded", extra=_facts(error))

    def _is_done(
        self, vlm: VLM, attachment: Attachment, writer: Writer, jobs: Sequence[Job]
    ) -> bool:
        """Answer a batch; whether nothing went wrong."""
        started = monotonic()
        try:
            self._run(vlm, attachment, writer, jobs)
        except Exception as error:  # of the guard, of the model or of the machine
            self.faults += 1
            self._metrics.faults.inc()
            _log.error("fault", extra=_facts(error))
        else:
            self.healthy = True
            return True
        finally:
            self._seconds += (monotonic() - started - self._seconds) / _LATELY
            self._metrics.batch_answers.observe(sum(job.count for job in jobs))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # it may have been out of memory
        return False

    def _run(self, vlm: VLM, attachment: Attachment, writer: Writer, jobs: Sequence[Job]) -> None:
        """One `generate` under the guard."""
        inputs = writer.encode([job.prompt for job in jobs for _ in range(job.count)])
        width = inputs["input_ids"].shape[1]
        ends = _end_tokens(vlm.model)
        answers = Answers(jobs, vlm.tokenizer, width, ends, lambda: attachment.receipts)
        sampling = jobs[0].sampling
        with _seeded(sampling.seed, input_device(vlm.model)):
            attachment.generate(
                **inputs,
                **sampling.options,
                max_new_tokens=max(job.limit for job in jobs),
                stopping_criteria=StoppingCriteriaList([answers]),
            )
        for answer in answers.rows:
            answer.cut()

    def _check(self, vlm: VLM, attachment: Attachment, writer: Writer) -> None:
        """Show that a request with an image is judged.

        Raises:
            Exception: it is not, or the pass failed.
        """
        inputs = writer.encode([writer.write(_CANARY, [blank_image()])])
        receipts = attachment.generate(**inputs, max_new_tokens=1, do_sample=False).receipts
        if not all(receipt.findings for receipt in receipts):
            raise SafeguardError("A request with an image was not judged, so nothing is served.")
        self.healthy = True


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, if there is one; other batches draw on as if nothing were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _facts(error: BaseException) -> dict[str, str]:
    """What may be logged of an error: of ours its sentence, of others no word of theirs."""
    facts = {"kind": type(error).__name__, "place": place_of(error)}
    return facts | ({"reason": str(error)} if isinstance(error, SafeguardError) else {})
