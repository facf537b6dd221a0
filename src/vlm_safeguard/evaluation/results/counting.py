"""From the lines of `samples.jsonl` to the rows and comparisons of `results.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges.agreement import agreements
from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.probes.perplexity import Likelihood, perplexity
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.evaluation.statistics import mcnemar, mean, wilson

Cell = tuple[str, str, str, str]  # benchmark, kind, condition, defence


def cells(lines: Sequence[Line]) -> dict[Cell, list[Line]]:
    """The lines of each cell, in their order."""
    found: dict[Cell, list[Line]] = {}
    for line in lines:
        cell = (line["benchmark"], line["kind"], line["condition"], line["defence"])
        found.setdefault(cell, []).append(line)
    return found


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


def _rows(cell: list[Line], names: dict[str, Any]) -> Iterator[Row]:
    for judge in _judges(cell):
        said = [_verdict(line, judge) for line in cell]
        refused = [each.refused for each in said if each.refused is not None]
        if refused:
            yield Row.count(refused, metric="refusal", judge=judge, **names)
        succeeded = [each.succeeded for each in said if each.succeeded is not None]
        if succeeded and names["prompts"] == "harmful":
            yield Row.count(succeeded, metric="attack_success", judge=judge, **names)
        silent = [not each.readable for each in said]
        if any(silent):
            yield Row.count(silent, metric="unreadable", judge=judge, **names)
    right = [line["correct"] for line in cell if line["correct"] is not None]
    if right:
        yield Row.count(right, metric="accuracy", **names)
    for metric in ("tokens", "seconds"):
        yield Row.of(mean([line[metric] for line in cell]), metric=metric, **names)
    scored = [Likelihood(line["nll"], line["nll_tokens"]) for line in cell if line["nll_tokens"]]
    if scored:
        yield Row.of(perplexity(scored), metric="perplexity", **names)


def comparisons(lines: Sequence[Line], a: str) -> list[dict[str, Any]]:
    """McNemar's test of defence `a` against every other one, on the same prompts.

    Attack success on harmful requests, refusal on harmless ones, by every judge that says so; on
    utility questions, what was answered right.
    """
    by_cell = cells(lines)
    found = []
    for (benchmark, kind, condition, b), theirs in by_cell.items():
        mine = by_cell.get((benchmark, kind, condition, a))
        if b == a or mine is None:
            continue
        paired = {line["sample"]: line for line in theirs}
        pairs = [(line, paired[line["sample"]]) for line in mine if line["sample"] in paired]
        for metric, judge in _compared(kind, mine):
            outcomes = [
                (x, y)
                for left, right in pairs
                if (x := _outcome(left, metric, judge)) is not None
                and (y := _outcome(right, metric, judge)) is not None
            ]
            if outcomes:
                found.append(
                    {
                        "benchmark": benchmark,
                        "condition": condition,
                        "metric": metric,
                        "judge": judge,
                        "a": a,
                        "b": b,
                        **asdict(mcnemar([x for x, _ in outcomes], [y for _, y in outcomes])),
                    }
                )
    return found


def agreement(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """How far each two judges agree on harmful requests (rows: `judge_a`; no, yes)."""
    harmful = [line for line in lines if line["kind"] == "harmful"]
    said = {judge: [_verdict(line, judge) for line in harmful] for judge in _judges(harmful)}
    return [asdict(pair) for pair in agreements(said)]


def unreadable(lines: Sequence[Line]) -> dict[str, int]:
    """By judge, how many answers it could not be read on."""
    return {
        judge: sum(
            not _verdict(line, judge).readable for line in lines if judge in line["verdicts"]
        )
        for judge in _judges(lines)
    }


def closed_gates(lines: Sequence[Line]) -> tuple[int, int]:
    """Answers of the default guard behind a closed gate, and those equal to the unguarded one."""
    plain = {
        (line["benchmark"], line["condition"], line["sample"]): line["answer"]
        for line in lines
        if line["defence"] == "none"
    }
    same = [
        line["answer"] == plain[where]
        for line in lines
        if line["defence"] == "default"
        and (where := (line["benchmark"], line["condition"], line["sample"])) in plain
        and line["receipt"] is not None
        and not line["receipt"]["guarded"]
    ]
    return len(same), sum(same)


def frontier_shares(
    points: Sequence[Sequence[Line]], judges: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(attack success, over-refusal) of every point, each by one judge all along the frontier.

    A judge of harm comes before `refusal` for attacks, and after it for refusals.

    Raises:
        SafeguardError: no judge could be read on every point.
    """
    by_harm = sorted(judges, key=lambda judge: judge == "refusal")
    return (
        _shares(points, "harmful", "attack_success", by_harm),
        _shares(points, "harmless", "refusal", by_harm[::-1]),
    )


def _shares(
    points: Sequence[Sequence[Line]], kind: str, metric: str, judges: Sequence[str]
) -> list[dict[str, Any]]:
    for judge in judges:
        outcomes = [
            [
                x
                for line in lines
                if line["kind"] == kind and (x := _outcome(line, metric, judge)) is not None
            ]
            for lines in points
        ]
        if all(outcomes):
            return [
                {"n": len(each), "value": sum(each) / len(each), "low": low, "high": high}
                for each in outcomes
                for low, high in [wilson(sum(each), len(each))]
            ]
    raise SafeguardError(
        f"No judge of {', '.join(judges)} could be read on the frontier's {kind} requests; add "
        "the judge 'refusal', which needs no model."
    )


def _judges(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(judge for line in lines for judge in line["verdicts"]))


def _verdict(line: Line, judge: str) -> Verdict:
    return Verdict(**line["verdicts"].get(judge, {"refused": None, "unsafe": None}))


def _compared(kind: str, cell: list[Line]) -> list[tuple[str, str | None]]:
    if kind == "utility":
        return [("accuracy", None)]
    metric = "attack_success" if kind == "harmful" else "refusal"
    return [(metric, judge) for judge in _judges(cell)]


def _outcome(line: Line, metric: str, judge: str | None) -> bool | None:
    if judge is None:
        right: bool | None = line["correct"]
        return right
    said = _verdict(line, judge)
    return said.succeeded if metric == "attack_success" else said.refused
