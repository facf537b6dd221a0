"""Answers while they are generated: each one's text, where it ends, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from vlm_safeguard.engines.hooks.own_functions import ByPrompt
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.serving.jobs import Decided, Job, Over, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what a tokenizer writes for a part of a character


class Answer:
    """One answer to a job, token by token.

    Attributes:
        over: whether nothing more is said.
    """

    def __init__(self, job: Job, choice: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """The `choice`-th of the job's, with nothing said yet."""
        self.job, self._choice, self._tokenizer = job, choice, tokenizer
        self.ids: list[int] = []
        self._whole = ""  # the text of what is read, which later tokens do not change
        self._shown, self._read = 0, 0  # tokens that are read, less the latest; and with them
        self._sent = 0  # characters
        self.over = False

    def add(self, token: int, ends: bool) -> None:
        """Say one token more.

        Args:
            ends: whether it is one that ends an answer.
        """
        self.ids.append(token)
        text = self._text()
        stop = min((at for s in self.job.stops if (at := text.find(s)) >= 0), default=None)
        if ends or stop is not None:
            self._end(text[:stop], "stop")
        elif len(self.ids) >= self.job.limit:
            self._end(text, "length")
        else:
            self._send(text[: len(text) - self._held(text)])

    def cut(self) -> None:
        """End an answer that the model stopped of itself."""
        if not self.over:
            self._end(self._text(), "length")

    def _text(self) -> str:
        """All of it so far; only its last tokens are decoded, behind those that they lean on."""
        before = self._decoded(self.ids[self._shown : self._read])
        text = self._whole + self._decoded(self.ids[self._shown :])[len(before) :]
        if not text.endswith(_HALF):
            self._whole = text
            self._shown, self._read = self._read, len(self.ids)
        return text

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _held(self, text: str) -> int:
        """Characters at the end that what comes next may change, or that may begin a stop."""
        certain = text.rstrip(_HALF)
        begun = (
            length
            for stop in self.job.stops
            for length in range(min(len(stop) - 1, len(certain)), 0, -1)
            if certain.endswith(stop[:length])
        )
        return len(text) - len(certain) + max(begun, default=0)

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.job.tell(Piece(self._choice, text[self._sent :]))
            self._sent = len(text)

    def _end(self, text: str, reason: Literal["stop", "length"]) -> None:
        self.over = True
        self._send(text)
        self.job.tell(Over(self._choice, reason, tuple(self.ids)))


class Answers(ByPrompt):
    """Those of one batch, a row each; looked at after every token."""

    def __init__(
        self,
        jobs: Sequence[Job],
        tokenizer: PreTrainedTokenizerBase,
        width: int,
        ends: frozenset[int],
        receipts: Callable[[], Sequence[Receipt]],
        step: Callable[[], None],
    ) -> None:
        """Of jobs whose prompts, and what answers begin with, have `width` tokens with padding.

        Args:
            ends: tokens that end an answer.
            receipts: of the batch's rows, once the gate has decided.
            step: called after every token; others may run the model until it returns.
        """
        self.rows = [Answer(job, n, tokenizer) for job in jobs for n in range(job.count)]
        self._starts = [width - len(answer.job.beginning) for answer in self.rows]
        self._ends, self._receipts, self._step = ends, receipts, step
        self._decided = False

    def ends(self, ids: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
        """See `ByPrompt`: answers that are over, or that nobody waits for."""
        if not self._decided:
            self.decide()
        for row, number in enumerate(prompts):
            answer = self.rows[number]
            for token in ids[row, self._starts[number] + len(answer.ids) :].tolist():
                if answer.over or answer.job.cancelled:
                    break
                answer.add(token, token in self._ends)
        self._step()
        over = [self.rows[n].over or self.rows[n].job.cancelled for n in prompts]
        return torch.tensor(over, device=ids.device)

    def decide(self) -> None:
        """Tell every job what the gate decided.

        Raises:
            SafeguardError: there is not a receipt for each row.
        """
        receipts = self._receipts()
        if len(receipts) != len(self.rows):
            raise SafeguardError(
                f"There are {len(receipts)} receipts for {len(self.rows)} answers, so it is not "
                "known what was guarded; nothing more is generated."
            )
        self._decided = True
        for answer, receipt in zip(self.rows, receipts, strict=True):
            job = answer.job
            if not job.begun:
                job.tell(Decided(receipt if job.opened is None else job.opened.receipt))
