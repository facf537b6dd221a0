"""inspect-ai's logs: their samples as lines of `samples.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from inspect_ai.log import EvalLog, EvalSample, read_eval_log

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.results.lines import Line

_JUDGES = {"refusal": "refusal", "llama_guard": "llama-guard", "rubric": "rubric"}
_SAID = ("refused", "unsafe", "score", "note")  # what is kept of a verdict


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


def _line(sample: EvalSample, defence: str) -> Line:
    facts, made = sample.metadata, sample.output.metadata or {}
    scores = sample.scores or {}
    # inspect asks the metric for right or wrong; here the judge's own words are taken
    verdicts = {
        _JUDGES[name]: Verdict(**{fact: score.metadata[fact] for fact in _SAID})
        for name, score in scores.items()  # in the plan's order
        if name in _JUDGES and score.metadata
    }
    right = scores.get("right") if facts["kind"] == "utility" else None
    return Line(
        benchmark=facts["benchmark"],
        sample=str(sample.id),
        kind=facts["kind"],
        category=facts["category"],
        condition=facts["condition"],
        defence=defence,
        request=facts["request"],
        answer=sample.output.completion,
        tokens=made["tokens"],
        seconds=made["seconds"],
        receipt=made["receipt"],
        verdicts={} if facts["kind"] == "utility" else verdicts,
        correct=None if right is None else bool(right.as_int()),
    )
