"""What is measured on an evaluation's models besides their answers.

Each result is kept in `measured.jsonl`, from where a run that goes on takes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_safeguard.evaluation.answers.journal import Journal
from vlm_safeguard.evaluation.answers.models import ModelName, loaded, loaded_vlm, release
from vlm_safeguard.evaluation.probes.divergence import Divergence, divergences
from vlm_safeguard.evaluation.probes.gap import held_out_gap
from vlm_safeguard.evaluation.probes.perplexity import likelihoods
from vlm_safeguard.evaluation.probes.speed import TimeRatio, time_ratio
from vlm_safeguard.evaluation.results.gap import GapRecord
from vlm_safeguard.evaluation.results.rows import DEFAULT, Row
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.response import Response

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.answers.progress import Report
    from vlm_safeguard.evaluation.asks.ask import Ask
    from vlm_safeguard.evaluation.plan import Plan
    from vlm_safeguard.evaluation.results.lines import Line

_DIVERGED = 100  # harmless requests of a cell whose divergence is measured
_SCORED = 8  # batches of answers that are scored before they are kept


class Measurements:
    """The probes of one evaluation, on its models and its guard."""

    def __init__(self, plan: Plan, out: Path, report: Report) -> None:
        """Nothing is measured yet.

        Args:
            out: the evaluation's folder, in which the guard is.
            report: called with (what is running, parts done, parts in all).
        """
        self._plan, self._report = plan, report
        self._model = ModelName(plan.model, plan.loading)
        self._guard = Guard.from_pretrained(out / "guard")
        self._journal = Journal(out / "measured.jsonl")

    def gap(self) -> GapRecord:
        """The safety alignment gap on held-out prompts."""
        self._report("the gap", 0, 1)
        return self._journal.kept(
            ["gap", *self._model.weights],
            GapRecord,
            lambda: held_out_gap(loaded_vlm(self._model), self._guard),
        )

    def time_ratio(self) -> TimeRatio:
        """Guarded over unguarded seconds."""
        self._report("the time it takes", 0, 1)
        return self._journal.kept(
            ["time", *self._model.key],
            TimeRatio,
            lambda: time_ratio(loaded_vlm(self._model), self._guard),
        )

    def divergence(self, asks: Sequence[Ask]) -> list[Row]:
        """How far the default guard moves the model on harmless requests, a row a cell."""
        cells: dict[tuple[str, str], list[Ask]] = {}
        for ask in asks:
            if ask.sample.kind == "harmless":
                cells.setdefault((ask.benchmark, ask.condition), []).append(ask)
        rows = []
        for done, ((benchmark, condition), cell) in enumerate(cells.items()):
            self._report("divergence", done, len(cells))
            rows.append(
                Row.of(
                    self._divergence(cell[:_DIVERGED]).mean(),
                    metric="kl",
                    prompts="harmless",
                    benchmark=benchmark,
                    condition=condition,
                    defence=DEFAULT,
                )
            )
        return rows

    def _divergence(self, cell: Sequence[Ask]) -> Divergence:
        tokens, ids = self._plan.max_new_tokens, [ask.sample.id for ask in cell]
        guard = self._guard
        if guard.policy.response is Response.REFUSAL:  # whose answers begin as the model's do not
            guard = guard.variant(response=Response.TEXT)
        return self._journal.kept(
            ["kl", *self._model.weights, cell[0].benchmark, cell[0].condition, tokens, ids],
            Divergence,
            lambda: Divergence.of(
                divergences(
                    loaded_vlm(self._model),
                    [ask.chat() for ask in cell],
                    guard.attach,
                    max_new_tokens=tokens,
                    batch_size=self._plan.batch_size,
                )
            ),
        )

    def with_likelihoods(self, lines: Sequence[Line]) -> list[Line]:
        """The lines with how likely each answer to a request in words is; all models are let go.

        Raises:
            SafeguardError: the scoring model does not load, or gives an answer no likelihood.
        """
        plan = self._plan
        scorer = self._model
        if plan.ppl_model not in (None, plan.model):
            scorer = ModelName(plan.ppl_model, plan.loading.for_another_model())

        def key(line: Line) -> str:
            return json.dumps(["nll", scorer.name, line.request, line.answer])

        answers = {key(line): line for line in lines if line.kind != "utility"}
        missing = [name for name in answers if self._journal.get(name) is None]
        if missing and scorer != self._model:
            release()  # room for another model
        at_once = _SCORED * plan.batch_size
        for start in range(0, len(missing), at_once):
            self._report("how likely the answers are", start, len(missing))
            part = missing[start : start + at_once]
            scored = likelihoods(
                loaded(scorer),
                [answers[name].request for name in part],
                [answers[name].answer for name in part],
                batch_size=plan.batch_size,
            )
            self._journal.add(
                {
                    name: {"nll": each.nll, "tokens": each.tokens}
                    for name, each in zip(part, scored, strict=True)
                }
            )
        release()

        def scored_line(line: Line) -> Line:
            known = self._journal.get(key(line))
            if known is None:
                return line
            return line.model_copy(update={"nll": known["nll"], "nll_tokens": known["tokens"]})

        return [scored_line(line) if line.kind != "utility" else line for line in lines]
