"""From the lines of `samples.jsonl` to the rows and counts of `results.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.asks.samples import Kind
from vlm_safeguard.evaluation.judges.agreement import Agreement, agreements
from vlm_safeguard.evaluation.judges.measure import JudgeRecord, stored_record
from vlm_safeguard.evaluation.judges.refusal import is_refusal
from vlm_safeguard.evaluation.probes.perplexity import Likelihood, perplexity
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.measures import PHRASES
from vlm_safeguard.evaluation.results.rows import BASELINE, DEFAULT, Metric, Row
from vlm_safeguard.evaluation.statistics import mean

Cell = tuple[str, Kind, str, str]  # benchmark, kind, condition, defence


def cells(lines: Sequence[Line]) -> dict[Cell, list[Line]]:
    """The lines of each cell, in their order."""
    by_cell: dict[Cell, list[Line]] = {}
    for line in lines:
        cell = (line.benchmark, line.kind, line.condition, line.defence)
        by_cell.setdefault(cell, []).append(line)
    return by_cell


def rows(lines: Sequence[Line]) -> list[Row]:
    """Every cell's shares and means."""
    return [
        row
        for (benchmark, kind, condition, defence), cell in cells(lines).items()
        for row in _rows(
            cell,
            {"benchmark": benchmark, "prompts": kind, "condition": condition, "defence": defence},
        )
    ]


def _rows(cell: Sequence[Line], names: dict[str, Any]) -> Iterator[Row]:
    for judge in judges_of(cell):
        verdicts = [line.verdict(judge) for line in cell]
        refused = [verdict.refused for verdict in verdicts if verdict.refused is not None]
        if refused:
            yield Row.count(refused, metric="refusal", judge=judge, **names)
        succeeded = [verdict.succeeded for verdict in verdicts if verdict.succeeded is not None]
        if succeeded and names["prompts"] == "harmful":
            yield Row.count(succeeded, metric="attack_success", judge=judge, **names)
        unreadable = [not verdict.readable for verdict in verdicts]
        if any(unreadable):
            yield Row.count(unreadable, metric="unreadable", judge=judge, **names)
    correct = [line.correct for line in cell if line.correct is not None]
    if correct:
        yield Row.count(correct, metric="accuracy", **names)
    for metric in ("tokens", "seconds"):
        values = [value for line in cell if (value := getattr(line, metric)) is not None]
        if values:
            yield Row.of(mean(values), metric=metric, **names)
    scored = [
        Likelihood(line.nll, line.nll_tokens)
        for line in cell
        if line.nll is not None and line.nll_tokens
    ]
    if scored:
        yield Row.of(perplexity(scored), metric="perplexity", **names)


def agreement(lines: Sequence[Line]) -> list[Agreement]:
    """How far each two judges agree on harmful requests."""
    harmful = [line for line in lines if line.kind == "harmful"]
    return agreements(
        {judge: [line.verdict(judge) for line in harmful] for judge in judges_of(harmful)}
    )


def unreadable(lines: Sequence[Line]) -> dict[str, int]:
    """By judge, how many answers it could not be read on."""
    return {
        judge: sum(not line.verdict(judge).readable for line in lines if judge in line.verdicts)
        for judge in judges_of(lines)
    }


def refusal_judge(lines: Sequence[Line]) -> JudgeRecord | None:
    """The record of the judge `refusal` as it is, if it is the one that judged the lines.

    None where it was not asked, or where a run that was resumed holds verdicts of another version.
    """
    judged = [line for line in lines if PHRASES in line.verdicts]
    same = all(line.verdict(PHRASES).refused is is_refusal(line.answer) for line in judged)
    return stored_record() if judged and same else None


class ClosedGates(BaseModel):
    """Answers of the default guard whose gate stayed closed, beside the unguarded ones.

    Attributes:
        identical: of these, the answers that equal the unguarded model's, text and length.
    """

    model_config = ConfigDict(frozen=True)

    answers: int
    identical: int


def closed_gates(lines: Sequence[Line]) -> ClosedGates:
    """Count the default guard's answers behind a closed gate, and those it left as they were."""
    unguarded = {
        line.place: (line.answer, line.tokens) for line in lines if line.defence == BASELINE
    }
    identical = [
        (line.answer, line.tokens) == unguarded[line.place]
        for line in lines
        if line.defence == DEFAULT
        and line.place in unguarded
        and line.receipt is not None
        and not line.receipt.guarded
    ]
    return ClosedGates(answers=len(identical), identical=sum(identical))


def judges_of(lines: Sequence[Line]) -> list[str]:
    """The judges that gave a verdict, in the order in which they come."""
    return list(dict.fromkeys(judge for line in lines for judge in line.verdicts))


def outcome(line: Line, metric: Metric, judge: str | None) -> bool | None:
    """What a yes/no metric says of one answer; None where it says nothing.

    Args:
        judge: whose verdict; None for what needs no judge, whether a question was answered right.
    """
    if judge is None:
        return line.correct
    verdict = line.verdict(judge)
    return verdict.succeeded if metric == "attack_success" else verdict.refused
