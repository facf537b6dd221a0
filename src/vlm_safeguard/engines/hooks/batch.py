"""A batch of padded prompts: its requests, what was decided on them, and which rows are edited."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.text_pass import TextPass
from vlm_safeguard.policy.decision import Decision, decide
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.request import Request, read_request
from vlm_safeguard.policy.rows import Rows, token_starts
from vlm_safeguard.policy.span import Span


@dataclass
class Batch:
    """Requests whose prompts have been or are being read.

    Attributes:
        policy: that decides on them.
        requests: one a row of the batch.
        rows: the prompts' tokens that the edit spans; positions are those of the padded rows.
        ends: (requests,) position of the token that each decision is taken from.
        stops: (requests,) position of each prompt's last token: behind the end, where a part of the
            answer stands in it already.
        text_ends: (requests,) each text's last token, counted as rows count.
        spoken: (requests,) tokens of the refusal prefix that stand in the prompt already; all of
            them where it holds another beginning of an answer, which cannot go on in them.
        editable: (requests,) bool, those that the edit acts on at all.
        decision: so far.
        coordinates: layer → (tokens, m) of the text-only pass, text after text; empty where it was
            not run.
        refusals: text → the refusal prefix whose first token is likeliest behind it.
        read_texts: the text-only pass that read the editable requests' texts, if it was made now.
        harm: request → its scores before and after the edit that reached it first.
        finished: whether the pass that read the prompts' ends is over, receipts and all.
        answers: (requests, tokens) ids that followed one by one, where not `generate` makes the
            passes.
    """

    policy: Policy
    requests: tuple[Request, ...]
    rows: Rows
    ends: torch.Tensor
    stops: torch.Tensor
    text_ends: torch.Tensor
    spoken: torch.Tensor
    editable: torch.Tensor
    decision: Decision
    coordinates: dict[int, torch.Tensor] = field(default_factory=dict)
    refusals: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    read_texts: TextPass | None = None
    harm: dict[int, tuple[float, float]] = field(default_factory=dict)
    finished: bool = False
    answers: torch.Tensor | None = None

    @classmethod
    def read(cls, policy: Policy, ids: torch.Tensor, mask: torch.Tensor | None) -> Batch:
        """Read prompts; only criteria that need no pass have been asked yet.

        Args:
            ids: (rows, tokens) whole prompts.
            mask: (rows, tokens), zero where there is padding; None for none.

        Raises:
            SafeguardError: a row holds no text.
        """
        tokens = ids.tolist()
        kept = [[True] * len(row) for row in tokens] if mask is None else mask.bool().tolist()
        requests, places, ends, stops = [], [], [], []
        for number, (row, keep) in enumerate(zip(tokens, kept, strict=True)):
            standing = [position for position, k in enumerate(keep) if k]
            try:
                request = read_request(policy, [row[position] for position in standing])
            except ValueError as error:
                raise SafeguardError(f"Row {number} of the batch: {error}.") from error
            requests.append(request)
            places += [standing[position] for position, _ in request.spanned]
            ends.append(standing[request.last])
            stops.append(standing[-1])
        prefix = policy.refusal_prefix
        rows = Rows.of(requests, len(prefix))
        starts = token_starts([r.text for r in requests], len(prefix))
        editable = torch.tensor([policy.guards_text or r.media.total > 0 for r in requests])
        asked = [(0,) if e else () for e in editable.tolist()]
        return cls(
            policy,
            tuple(requests),
            Rows(rows.owner, torch.tensor(places), rows.token, rows.last),
            ends=torch.tensor(ends),
            stops=torch.tensor(stops),
            text_ends=torch.tensor([starts[r.text] + len(r.text) - 1 for r in requests]),
            spoken=torch.tensor([policy.spoken(r.prefill) for r in requests]),
            editable=editable,
            decision=decide(policy.gate, "nothing", asked, None, len(policy.layers)),
        )

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """Each request's text."""
        return [request.text for request in self.requests]

    def decide_image(self, reading: Reading) -> None:
        """Let the multimodal pass open the gate, too, of requests that hold media.

        Args:
            reading: a row for each request.
        """
        seeing = [(i,) if request.media.total else () for i, request in enumerate(self.requests)]
        more = decide(self.policy.gate, "image", seeing, reading, len(self.policy.layers))
        self.decision = self.decision.merged(more)

    def answer_rows(self, start: int, stop: int) -> Rows:
        """The answers' tokens at these positions of a pass, where all of them are edited."""
        if not self.policy.edits or self.policy.edit.span is not Span.ANSWER:
            return Rows.none()
        return Rows.of_answers(self.text_ends, start, stop)

    def opening_rows(self, answers: torch.Tensor, new: int) -> Rows:
        """The answers' tokens for as long as they follow the refusal prefix, where that counts.

        Of requests that are open, or, while their prompts are being read, can be opened yet.

        Args:
            answers: (requests, tokens) ids of the answers so far.
            new: how many tokens, and their prompts' before them, the current pass reads.
        """
        followed = self.policy.followed
        among = self.decision.is_open.any(1) if self.finished else self.editable
        spoken = self.spoken.masked_fill(~among, len(followed))
        return Rows.of_openings(self.text_ends, answers, followed, spoken, new)

    def beginning(self, request: int) -> tuple[int, ...]:
        """What an answer from the text begins with."""
        beginnings = self.policy.beginnings
        if len(beginnings) > 1:
            return self.refusals[self.texts[request]]
        return beginnings[0] if beginnings else ()

    def receipts(self, policy_sha256: str) -> list[Receipt]:
        """What was done to each request, and why."""
        return [
            Receipt.of(
                request,
                findings,
                response=self.policy.response if any(is_open) else None,
                layers=tuple(n for n, x in zip(self.policy.layers, is_open, strict=True) if x),
                edit=self.policy.edit.name,
                harm=self.harm.get(number),
                policy=policy_sha256,
            )
            for number, (request, findings, is_open) in enumerate(
                zip(
                    self.requests,
                    self.decision.findings,
                    self.decision.is_open.tolist(),
                    strict=True,
                )
            )
        ]
