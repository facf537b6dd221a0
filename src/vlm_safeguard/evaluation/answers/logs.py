"""inspect-ai's logs: their samples as lines of `samples.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from inspect_ai.log import EvalLog, EvalSample, read_eval_log

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.reply import Reply, line_of
from vlm_safeguard.evaluation.asks.ask import AskRecord
from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.results.lines import Line

#: Scorer → the judge that it asks.
_JUDGES = {"refusal": "refusal", "llama_guard": "llama-guard", "rubric": "rubric"}


def answered(logs: Iterable[EvalLog], defence: str) -> Iterator[Line]:
    """One line an answer, in the samples' own order.

    Raises:
        SafeguardError: a sample has no answer, and why.
    """
    for header in logs:
        log = read_eval_log(header.location)
        samples = sorted(log.samples or [], key=lambda sample: sample.metadata["number"])
        for sample in samples:
            if sample.error is not None:
                raise SafeguardError(
                    f"{sample.metadata['benchmark']}, sample {sample.id}, {defence}: "
                    f"{sample.error.message}"
                )
            yield _line(sample, defence)


def first_failure(logs: Iterable[EvalLog]) -> str:
    """What the first log that failed says."""
    for log in logs:
        if log.status == "success":
            continue
        samples = read_eval_log(log.location).samples or []
        failures = [(f"sample {sample.id}", sample.error) for sample in samples if sample.error]
        where, error = failures[0] if failures else ("the task", log.error)
        reason = (error.message if error else f"it was {log.status}").strip().splitlines()[0]
        return f"{log.eval.task}, {where}: {reason.rstrip('.')}."
    return "no log says why."


def _line(sample: EvalSample, defence: str) -> Line:
    ask, scores = sample.metadata_as(AskRecord), sample.scores or {}
    reply = Reply(text=sample.output.completion, **(sample.output.metadata or {}))
    if ask.kind == "utility":
        right = scores.get("right")
        correct = None if right is None else bool(right.as_int())
        return line_of(ask, str(sample.id), defence, reply, correct=correct)
    # the metric is 1 or 0; what counts is the judge's whole verdict
    verdicts = {
        _JUDGES[name]: Verdict(**{each.name: score.metadata[each.name] for each in fields(Verdict)})
        for name, score in scores.items()  # in the plan's order
        if name in _JUDGES and score.metadata
    }
    return line_of(ask, str(sample.id), defence, reply, verdicts=verdicts)
