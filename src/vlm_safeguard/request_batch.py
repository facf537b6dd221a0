"""A batch of requests as a guard reads it: what each asks, and which of its tokens are edited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

import torch

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    from vlm_safeguard.policy.edits import Edit
    from vlm_safeguard.policy.text_view import TextView


@dataclass(frozen=True)
class Places:
    """Tokens to edit, (n,) each.

    Attributes:
        row: whose they are.
        position: where they stand in their row.
        token: their counterparts in the text-only pass, counted through all that it reads.
        last: whether it is edited as the prompt's last token is.
    """

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, entries: Sequence[tuple[int, int, int, bool]]) -> Self:
        """From (row, position, token, last) of each."""
        row, position, token, last = zip(*entries, strict=True)
        return cls(*map(torch.tensor, (row, position, token, last)))

    def between(self, start: int, stop: int) -> Places:
        """Those at positions from `start` to before `stop`, counted from `start`."""
        chosen = (self.position >= start) & (self.position < stop)
        return Places(
            self.row[chosen], self.position[chosen] - start, self.token[chosen], self.last[chosen]
        )

    def following(self, start: int, stop: int) -> Places:
        """Every row's tokens after its last one, at these positions of a pass, edited as that."""
        ends = self.token[self.last]
        count = stop - start
        return Places(
            self.row[self.last].repeat_interleave(count),
            torch.arange(start, stop).repeat(len(ends)),
            ends.repeat_interleave(count),
            torch.ones(len(ends) * count, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return len(self.row)

    def __add__(self, other: Places) -> Places:
        return Places(
            *(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self))
        )


@dataclass
class RequestBatch:
    """A batch of requests whose prompts have been or are being read.

    Attributes:
        facts: of each row, what its receipt will say.
        texts: of each row, the token ids of its request without images.
        opening: token ids that the text-only pass reads behind each text.
        follows: whether an answer that opens so is edited there.
        is_open: (rows, guarded layers) gate decisions.
        places: the prompts' tokens that the edit spans.
        editable: (rows,) rows the edit acts on at all.
        text: layer → (tokens, m) coordinates of the text-only pass, text after text; empty where
            it was not run.
        first_edited: the layers where some row is edited first; its receipt is filled there.
        settled: whether all decisions are made: they are made once and then stand.
        finished: whether the pass that read the prompts' ends is over, receipts and all.
        answers: (rows, tokens) ids that followed one by one, where not `generate` makes the passes.
    """

    facts: list[dict[str, Any]]
    texts: list[tuple[int, ...]]
    opening: tuple[int, ...]
    follows: bool
    is_open: torch.Tensor
    places: Places
    editable: torch.Tensor
    text: dict[int, torch.Tensor] = field(default_factory=dict)
    first_edited: set[int] = field(default_factory=set)
    settled: bool = False
    finished: bool = False
    answers: torch.Tensor | None = None

    @classmethod
    def read(
        cls,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        view: TextView,
        edit: Edit,
        opening: tuple[int, ...],
        follows: bool,
        layers: int,
    ) -> Self:
        """Open to `edit` wherever it acts; no gate has been asked yet.

        Args:
            ids: (rows, tokens) whole prompts.
            mask: (rows, tokens), zero where there is padding; None for none.
            opening: of the model's refusals.
            follows: whether an answer that opens so is edited there.
            layers: how many are guarded.

        Raises:
            SafeguardError: a row holds no text.
        """
        tokens = ids.tolist()
        kept = [[True] * len(row) for row in tokens] if mask is None else mask.bool().tolist()
        facts, texts, aligned = [], [], []
        for number, (row, keep) in enumerate(zip(tokens, kept, strict=True)):
            standing = [position for position, k in enumerate(keep) if k]
            seen = [row[position] for position in standing]
            text, origins = view.aligned(seen)
            if not text:
                raise SafeguardError(f"Row {number} of the batch holds no text to judge.")
            images, image_tokens = view.count(seen)
            facts.append({"images": images, "image_tokens": image_tokens, "text_tokens": len(text)})
            texts.append(tuple(text))
            first = view.first_image(seen) if edit.span == "request" else len(seen)
            spanned = {
                standing[origin]: token
                for token, origin in enumerate(origins)
                if origin is not None and origin >= first
            }
            last = standing[-1]
            aligned.append((spanned | {last: len(text) - 1}, last))
        editable = torch.tensor([edit.edits_text or fact["images"] > 0 for fact in facts])
        starts = _starts(texts, len(opening))
        places = Places.of(
            [
                (row, position, starts[texts[row]] + token, position == last)
                for row, (spanned, last) in enumerate(aligned)
                for position, token in sorted(spanned.items())
            ]
        )
        return cls(
            facts, texts, opening, follows, editable[:, None].repeat(1, layers), places, editable
        )

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def last(self) -> torch.Tensor:
        """(rows,) position of each row's last prompt token."""
        return self.places.position[self.places.last]

    def opening_places(self, answers: torch.Tensor, new: int) -> Places:
        """The tokens of answers for as long as they open as the model's refusals do.

        Of rows that are open, or, while their prompts are being read, can be opened yet.

        Args:
            answers: (rows, tokens) ids of the answers so far.
            new: how many tokens, and their prompts' before them, the current pass reads.
        """
        count = min(len(self.opening) if self.follows else 0, answers.shape[1])
        start = answers.shape[1] - new
        if start >= count:  # without asking the device
            return self.places.between(0, 0)
        said = answers[:, :count].cpu()
        follows = (said == torch.tensor(self.opening[:count])).cumprod(1).bool()
        follows &= (self.is_open.any(1) if self.finished else self.editable)[:, None]
        follows[:, : max(start, 0)] = False
        row, place = follows.nonzero().unbind(1)
        ends = self.places.token[self.places.last]
        return Places(row, place - start, ends[row] + 1 + place, torch.zeros_like(row).bool())


@dataclass
class TextReadings:
    """Text-only passes that are already made, for guards of one model that read the same prompts.

    Attributes:
        states: text and opening → layer → (tokens, hidden) states.
        final: likewise → (1 + opening, hidden) final states of the text's last token and the
            opening's, from which the next ones are predicted.
    """

    states: dict[tuple[int, ...], dict[int, torch.Tensor]] = field(default_factory=dict)
    final: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def missing(
        self, texts: Iterable[tuple[int, ...]], opening: tuple[int, ...], layers: Iterable[int]
    ) -> list[tuple[int, ...]]:
        """Those of `texts` that are not read, with the opening behind them, at all `layers`."""
        needed = set(layers)
        return [text for text in texts if not needed <= self.states.get(text + opening, {}).keys()]


def _starts(texts: Iterable[tuple[int, ...]], behind: int) -> dict[tuple[int, ...], int]:
    """Where each different text begins when tokens are counted through, with some behind each."""
    starts, total = {}, 0
    for text in dict.fromkeys(texts):
        starts[text], total = total, total + len(text) + behind
    return starts
