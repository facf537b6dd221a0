"""Where a forward pass stands: which requests it reads, and which of their tokens it may edit.

`generate` says what the whole prompt is, so that each of its passes can be located in it, whatever
way of decoding makes them. A plain `forward` reads a whole prompt, or one token more of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlm_safeguard.engines.hooks.batch import Batch
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.rows import Rows
from vlm_safeguard.policy.span import Span

#: Reads a batch of whole prompts, (rows, tokens) ids and mask, before the first pass over them.
ReadBatch = Callable[[torch.Tensor, torch.Tensor | None], Batch]


@dataclass(frozen=True)
class Pass:
    """One forward pass, as far as a guard is concerned.

    Attributes:
        batch: whose tokens it reads.
        rows: those that may be edited, positions counted from the pass's first.
        start: where its tokens start in their rows.
        width: tokens in a row.
        reads_end: whether the prompts' ends are among them.
    """

    batch: Batch
    rows: Rows
    start: int
    width: int
    reads_end: bool


@dataclass
class Prompt:
    """What `generate` was given to continue: (rows, tokens) ids and mask, and what came of it.

    Attributes:
        batch: what the prompts ask; None until they are read.
        answering: whether the prompts' ends are read and cached: what follows is the answer.
        written: (rows, tokens) all ids up to the end of the pass that comes next.
        opening: what that pass edits of the answers' openings, if anything; while answering.
        noted: whether its receipts are kept, which those of texts in a request's place are not.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    batch: Batch | None = None
    answering: bool = False
    written: torch.Tensor | None = None
    opening: Rows | None = None
    noted: bool = True

    def prepare(self, written: torch.Tensor, new: int | None) -> None:
        """Take note of all that is written, before the pass over its last `new` tokens.

        A pass is given new tokens only, and beams swap rows between passes.
        """
        self.written = written
        if self.answering and new is not None:
            assert self.batch is not None, "an answer follows a prompt"
            opening = self.batch.opening_rows(written[:, self.ids.shape[1] :], new)
            self.opening = opening if len(opening) else None

    def answer(self, ids: torch.Tensor) -> Pass | None:
        """A pass over the answer's tokens alone; None where nothing is edited.

        Nothing is read off tensors, so that it compiles.

        Raises:
            SafeguardError: there are not as many rows as before.
        """
        batch = self.batch
        assert batch is not None, "an answer follows a prompt"
        width = ids.shape[1]
        rows = self.opening
        if rows is None and batch.policy.edits and batch.policy.edit.span is Span.ANSWER:
            rows = batch.answer_rows(0, width)
        if rows is None:
            return None
        _check_rows(batch, ids)
        return Pass(batch, rows, start=0, width=width, reads_end=False)

    def locate(
        self, ids: torch.Tensor, mask: torch.Tensor | None, cached: int, read: ReadBatch
    ) -> Pass | None:
        """A pass over tokens from position `cached` on; None where there is nothing to do.

        Raises:
            SafeguardError: it cannot be located in the prompt, or the prompt cannot be guarded.
        """
        length, new = self.ids.shape[1], ids.shape[1]
        copies, left = divmod(len(ids), len(self.ids))
        overlap = self.ids[:, cached : cached + new]
        if left or not copies:
            raise SafeguardError(
                f"generate was given {len(self.ids)} prompts and runs {len(ids)} rows, so rows "
                "cannot be told apart; nothing more is generated."
            )
        if overlap.shape[1] and not torch.equal(
            overlap.repeat_interleave(copies, dim=0).to(ids.device), ids[:, : overlap.shape[1]]
        ):
            raise SafeguardError(
                "generate runs other tokens than the prompt it was given (a cache of another "
                "length?), so the request cannot be judged and nothing is generated."
            )
        if cached >= length and (self.batch is None or not self.batch.finished):
            raise SafeguardError(
                "The cache already holds the whole prompt, so its end cannot be guarded. "
                "Drop its last token, or pass a new cache."
            )
        if self.batch is None:
            self.batch = self._read(mask, copies, read)
        batch = self.batch
        _check_rows(batch, ids)
        rows = batch.rows.between(cached, cached + new)
        if cached + new > length:
            rows += batch.answer_rows(max(length - cached, 0), new)
        if self.written is not None:
            rows += batch.opening_rows(self.written[:, length:], new)
        reads_end = cached < length <= cached + new
        if not (len(rows) or reads_end):
            return None
        return Pass(batch, rows, start=cached, width=new, reads_end=reads_end)

    def decide(self, read: ReadBatch) -> Batch:
        """Read the prompts before there is any pass over them.

        Raises:
            SafeguardError: they cannot be guarded.
        """
        return self._read(None, 1, read)

    def _read(self, mask: torch.Tensor | None, copies: int, read: ReadBatch) -> Batch:
        length = self.ids.shape[1]
        known = self.mask
        if known is not None:
            known = known.repeat_interleave(copies, dim=0)
        elif mask is not None and mask.dim() == 2 and mask.shape[1] >= length:
            known = mask[:, :length]
        elif mask is not None:
            raise SafeguardError("Pass attention_mask to generate: the guard needs it.")
        batch = read(self.ids.repeat_interleave(copies, dim=0), known)
        if bool((batch.stops != length - 1).any()):
            raise SafeguardError(
                "The prompts are padded on the right; generate would continue the padding. "
                "Pad on the left."
            )
        return batch


def whole_prompt(ids: torch.Tensor, mask: torch.Tensor | None, read: ReadBatch) -> Pass:
    """A plain `forward` over whole prompts.

    Raises:
        SafeguardError: the mask is not one per token, or the prompts cannot be guarded.
    """
    if mask is not None and mask.shape != ids.shape:
        raise SafeguardError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: "
            "the text-only view cannot be made from other masks than one per token."
        )
    batch = read(ids, mask)
    return Pass(batch, batch.rows, start=0, width=ids.shape[1], reads_end=True)


def one_more_token(batch: Batch | None, ids: torch.Tensor) -> Pass | None:
    """A plain `forward` that goes on in a cache; None where nothing is edited.

    Args:
        batch: the requests that filled the cache, if known.

    Raises:
        SafeguardError: the requests are not known, or it is not one token a row.
    """
    if batch is None or not batch.finished:
        raise SafeguardError(
            "This pass continues a cache that was not filled under this guard, so it cannot "
            "be guarded. Pass the whole conversation with a new cache, or use generate."
        )
    if ids.shape[1] != 1:
        raise SafeguardError(
            f"{ids.shape[1]} new tokens on a cache that is already filled: whether a new "
            "request ends there cannot be known. Use generate, with the whole conversation, "
            "or a new cache."
        )
    _check_rows(batch, ids)
    answers = [ids] if batch.answers is None else [batch.answers, ids]
    batch.answers = torch.cat(answers, dim=1)
    rows = batch.answer_rows(0, 1) + batch.opening_rows(batch.answers, 1)
    return Pass(batch, rows, start=0, width=1, reads_end=False) if len(rows) else None


def _check_rows(batch: Batch, ids: torch.Tensor) -> None:
    if len(batch) != len(ids):
        raise SafeguardError(
            f"The batch changed from {len(batch)} to {len(ids)} rows within one generation, so "
            "rows cannot be told apart."
        )
