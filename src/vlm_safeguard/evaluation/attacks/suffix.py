"""Greedy coordinate gradient on a suffix of the request (GCG, Zou et al., arXiv 2307.15043).

It lowers the loss of the text-only pass; of a guard, how far its gate is open for the text and its
sentences. The request's last mark is left out, so that no sentence of its own is left to be judged.
nanogcg, which does this for causal language models, needs transformers 4.47 or older, and has
no other loss than a target text's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.attempt import AttackName, Attempt, behind
from vlm_safeguard.evaluation.attacks.openness import openness
from vlm_safeguard.evaluation.attacks.target import frozen
from vlm_safeguard.model.conversation import Chat, encode_chats
from vlm_safeguard.policy.token_ids import same_start
from vlm_safeguard.timing import now

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.asks.ask import Ask
    from vlm_safeguard.evaluation.attack_plan import AttackPlan, SuffixPlan
    from vlm_safeguard.evaluation.attacks.checkpoints import Checkpoints
    from vlm_safeguard.evaluation.attacks.target import Target

_FIRST = (" !", "!", " a", " x", "x")  # one of these, repeated, is what the search begins with
_ROWS = 64  # candidates in one pass


class Found(BaseModel):
    """A suffix: its text, the loss without it and with it, gradients taken, and seconds."""

    text: str
    first: float
    loss: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Suffix:
    """Swaps one token of the suffix at a time, of those that the gradient favours."""

    name: ClassVar[AttackName] = "suffix"

    def __call__(
        self, target: Target, asks: Sequence[Ask], plan: AttackPlan, checkpoints: Checkpoints
    ) -> list[Attempt]:
        """See `Attack`. Each request is shown its image as it is."""
        attempts = []
        budget = plan.suffix
        for done, ask in enumerate(asks):
            checkpoints.report(f"suffix, through {target.reader}", done, len(asks))
            found = checkpoints.kept(
                [
                    self.name,
                    target.reader,
                    plan.benchmark,
                    ask.sample.id,
                    *budget.model_dump().values(),
                    plan.seed,
                ],
                Found,
                lambda: Search(target, ask.chat(), budget, plan.seed).run(),  # noqa: B023
            )
            attempts.append(
                Attempt(
                    attack=self.name,
                    through=target.reader,
                    suffix=found.text,
                    loss=(found.first, found.loss),
                    steps=found.steps,
                    seconds=found.seconds,
                )
            )
        return attempts


class Search:
    """The search behind one request.

    Raises:
        SafeguardError: the tokenizer reads nothing that it can begin with as so many tokens.
    """

    def __init__(self, target: Target, chat: Chat, budget: SuffixPlan, seed: int) -> None:
        """Begin it with the same token again and again."""
        self._target, self._chat, self._budget = target, chat, budget
        self._backbone = target.vlm.backbone
        self._random = torch.Generator().manual_seed(seed)
        self._bare, *begun = self._encoded(["", *(each * budget.tokens for each in _FIRST)])
        for ids in begun:
            start = same_start(self._bare, ids)
            stop = len(ids) - same_start(self._bare[start:][::-1], ids[start:][::-1])
            self._before, self.suffix, self._after = ids[:start], ids[start:stop], ids[stop:]
            if len(self.suffix) == budget.tokens:
                return
        raise SafeguardError(
            f"The tokenizer reads none of {', '.join(map(repr, _FIRST))}, repeated behind a "
            f"request, as {budget.tokens} tokens, so a suffix cannot be searched token by token."
        )

    def run(self) -> Found:
        """Take all steps."""
        begun = now()
        with frozen(self._target.vlm.model):
            first = float(self.losses([self._bare])[0])
            loss = float(self.losses([self._around(self.suffix)])[0])
            for _ in range(self._budget.steps):
                candidates = self._readable(self._swaps())
                if not candidates:
                    continue
                losses = self.losses([self._around(each) for each in candidates])
                best = int(losses.argmin())
                if float(losses[best]) < loss:
                    loss, self.suffix = float(losses[best]), candidates[best]
        return Found(
            text=self.text(self.suffix),
            first=first,
            loss=loss,
            steps=self._budget.steps,
            seconds=now() - begun,
        )

    @torch.no_grad()
    def losses(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """(rows,) of prompts, as token ids, by the text-only pass: the highest of what is read."""
        gate = self._target.gate
        judged = [[tuple(row)] if gate is None else gate.judged(tuple(row)) for row in rows]
        texts = [(text, place > 0) for several in judged for place, text in enumerate(several)]
        parts = [texts[start : start + _ROWS] for start in range(0, len(texts), _ROWS)]
        losses = torch.cat([self._loss(*zip(*part, strict=True)).cpu() for part in parts])
        return torch.stack([each.max() for each in torch.split(losses, [len(x) for x in judged])])

    def text(self, suffix: Sequence[int]) -> str:
        """What a suffix's tokens say behind the request."""
        decode = self._target.vlm.tokenizer.decode
        return str(decode([*self._before, *suffix])).removeprefix(str(decode(self._before)))

    def _loss(self, rows: Sequence[Sequence[int]], alone: Sequence[bool]) -> torch.Tensor:
        """(rows,) of texts as they are, some of them sentences alone, with gradients."""
        if self._target.gate is not None:
            return openness(self._backbone, self._target.gate, rows, alone)
        states = self._backbone.run_text(rows)[:, -1]
        return self._target.losses(self._backbone.next_token_logits(states))

    def _swaps(self) -> list[list[int]]:
        """Suffixes with one token swapped, drawn of those that the gradient favours."""
        scores = self._gradient()
        scores[:, self._barred(scores.shape[1])] = torch.inf
        scores[torch.arange(len(self.suffix)), torch.tensor(self.suffix)] = torch.inf
        favoured = scores.topk(min(self._budget.top_k, scores.shape[1]), largest=False)
        pairs = [
            (position, int(token))
            for position in range(len(self.suffix))
            for token, score in zip(
                favoured.indices[position], favoured.values[position], strict=True
            )
            if score < torch.inf
        ]
        drawn = torch.randperm(len(pairs), generator=self._random)[: self._budget.candidates]
        return [
            [*self.suffix[:position], token, *self.suffix[position + 1 :]]
            for position, token in (pairs[n] for n in drawn.tolist())
        ]

    def _gradient(self) -> torch.Tensor:
        """(tokens, vocabulary) by how much each swap would change the loss, to first order."""
        embeddings = self._target.vlm.model.get_input_embeddings()
        leaves: list[torch.Tensor] = []

        def leaf(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        handle = embeddings.register_forward_hook(leaf)
        try:
            loss = self._loss([self._around(self.suffix)], [False])
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(loss.sum(), leaves[:1])
        start = len(self._before)
        at = gradient[0, start : start + len(self.suffix)]
        weight: torch.Tensor = embeddings.weight
        return (at @ weight.detach().to(at.dtype).mT).cpu()

    def _barred(self, vocabulary: int) -> torch.Tensor:
        """Ids that no suffix may hold: special tokens, and those that the tokenizer lacks."""
        tokenizer = self._target.vlm.tokenizer
        known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        return torch.tensor([*sorted(known), *range(len(tokenizer), vocabulary)], dtype=torch.long)

    def _readable(self, suffixes: Sequence[list[int]]) -> list[list[int]]:
        """Those that the tokenizer reads back as they are, behind the request as it is."""
        encoded = self._encoded([self.text(suffix) for suffix in suffixes])
        return [
            suffix
            for suffix, ids in zip(suffixes, encoded, strict=True)
            if ids == self._around(suffix)
        ]

    def _around(self, suffix: Sequence[int]) -> list[int]:
        return [*self._before, *suffix, *self._after]

    def _encoded(self, suffixes: Sequence[str]) -> list[list[int]]:
        """Token ids of the text-only prompt with each of these behind its request."""
        chats = self._target.texts([behind(self._chat, each) for each in suffixes])
        batch = encode_chats(self._target.vlm.processor, chats)
        return [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
