"""What follows from a suite's answers: divergence, likelihoods, the gap, and time; each kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_safeguard.evaluation.answers.batches import Journal
from vlm_safeguard.evaluation.answers.models import ModelName, loaded, loaded_vlm, release
from vlm_safeguard.evaluation.asks.conditions import illustrated
from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.evaluation.plan import Plan
from vlm_safeguard.evaluation.probes.divergence import divergences
from vlm_safeguard.evaluation.probes.gap import gap_record, gap_states
from vlm_safeguard.evaluation.probes.perplexity import likelihoods
from vlm_safeguard.evaluation.results.folder import write_gap
from vlm_safeguard.evaluation.results.gap import GapRecord
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.evaluation.statistics import ratio
from vlm_safeguard.evaluation.tasks import Asked
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.activations import image_states, text_states
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.model.vlm import VLM
from vlm_safeguard.policy.directions import auroc
from vlm_safeguard.timing import generation_ratio

#: Called with (what is running, parts done, parts in all).
Report = Callable[[str, int, int], None]

MEASURED = "measured.jsonl"
_GAP, _AUROC = 25, 100  # prompts of each kind in the gap's figure, and behind its AUROC
_TIMED = 4  # prompts of each kind in the batch that is timed
_DIVERGED = 100  # harmless requests of a cell whose divergence is measured


def measure_model(
    plan: Plan, asked: dict[str, Asked], out: Path, report: Report
) -> tuple[list[Row], dict[str, float]]:
    """The guarded model beside the unguarded one: (divergence by cell, ratio of time).

    Writes gap.json.
    """
    measured = Journal(out / MEASURED)
    report("the gap", 0, 1)
    vlm = loaded_vlm(ModelName(plan.model, plan.dtype, plan.device))
    guard = Guard.from_pretrained(out / "guard")
    gap = _kept(
        measured,
        ["gap", plan.model, plan.dtype],
        lambda: _gap(vlm, guard).model_dump(mode="json"),
    )
    write_gap(out, GapRecord.model_validate(gap))
    report("the time it takes", 0, 1)
    timing = _kept(
        measured,
        ["time", plan.model, plan.dtype, plan.device],
        lambda: _time_ratio(vlm, guard),
    )
    return _divergence_rows(plan, asked, vlm, guard, measured, report), timing


def _kept(journal: Journal, key: list[Any], compute: Callable[[], dict[str, Any]]) -> Any:
    """A result from the journal, or computed now and kept."""
    name = json.dumps(key)
    if (known := journal.get(name)) is None:
        journal.add({name: compute()})
        known = journal.get(name)
    return known


def measure_answers(plan: Plan, lines: Sequence[Line], out: Path, report: Report) -> list[Line]:
    """The lines with how likely each answer to a request in words is; all models are let go.

    Raises:
        SafeguardError: the scoring model does not load, or gives an answer no likelihood.
    """
    measured = Journal(out / MEASURED)
    scorer = plan.ppl_model or plan.model
    scored_lines = [line for line in lines if line.kind != "utility"]

    def key(line: Line) -> str:
        return json.dumps(["nll", scorer, line.request, line.answer])

    open_keys = {key(line): line for line in scored_lines if measured.get(key(line)) is None}
    if open_keys:
        if plan.ppl_model is not None:
            release()  # room for another model
        waiting = list(open_keys.items())
        for start in range(0, len(waiting), 8 * plan.batch_size):
            report("how likely the answers are", start, len(waiting))
            part = waiting[start : start + 8 * plan.batch_size]
            scored = likelihoods(
                loaded(ModelName(scorer, plan.dtype, plan.device)),
                [line.request for _, line in part],
                [line.answer for _, line in part],
                batch_size=plan.batch_size,
            )
            measured.add(
                {
                    name: {"nll": each.nll, "tokens": each.tokens}
                    for (name, _), each in zip(part, scored, strict=True)
                }
            )
    release()

    def with_likelihood(line: Line) -> Line:
        known = measured.get(key(line))
        assert known is not None
        return line.model_copy(update={"nll": known["nll"], "nll_tokens": known["tokens"]})

    return [line if line.kind == "utility" else with_likelihood(line) for line in lines]


def _divergence_rows(
    plan: Plan,
    asked: dict[str, Asked],
    vlm: VLM,
    guard: Guard,
    measured: Journal,
    report: Report,
) -> list[Row]:
    """How far the default guard moves the model on harmless requests, in nats a token."""
    found = []
    asks = plan.asks("default") if "default" in plan.defences else []
    for done, (benchmark, condition) in enumerate(asks):
        report("divergence", done, len(asks))
        harmless = [each for each in asked[benchmark.name] if each[1].kind == "harmless"]
        harmless = harmless[:_DIVERGED]
        if not harmless:
            continue

        def compute(harmless: Asked = harmless, condition: str = condition) -> dict[str, Any]:
            values = divergences(
                vlm,
                [illustrated(sample, number, condition) for number, sample in harmless],
                guard.attach,
                max_new_tokens=plan.max_new_tokens,
                batch_size=plan.batch_size,
            )
            return {
                "sums": [float(each.sum()) for each in values],
                "tokens": [len(each) for each in values],
            }

        ids = [sample.id for _, sample in harmless]
        key = ["kl", plan.model, plan.dtype, benchmark.name, condition, plan.max_new_tokens, ids]
        known = _kept(measured, key, compute)
        found.append(
            Row.of(
                ratio(known["sums"], known["tokens"]),
                metric="kl",
                prompts="harmless",
                benchmark=benchmark.name,
                condition=condition,
                defence="default",
            )
        )
    return found


def _gap(vlm: VLM, guard: Guard) -> GapRecord:
    """The gap on the held-out prompts, as points and as AUROC by layer."""
    harmful, harmless = (
        [prompt.text for prompt in read_prompts(kind)[:_AUROC]] for kind in ("harmful", "harmless")
    )
    requests = [*harmful, *harmless]
    backbone, processor = vlm.backbone, vlm.processor
    states = {
        "text": text_states(backbone, processor, requests)[0],
        "blank": image_states(backbone, processor, requests, [blank_image()] * len(requests)),
    }
    scores = {name: guard.policy.directions.harm_scores(each) for name, each in states.items()}
    return gap_record(
        gap_states(vlm, guard, harmful[:_GAP], harmless[:_GAP]),
        "blank",
        {
            name: auroc(each[: len(harmful)], each[len(harmful) :]).tolist()
            for name, each in scores.items()
        },
    )


def _time_ratio(vlm: VLM, guard: Guard) -> dict[str, Any]:
    """Guarded over unguarded seconds of a batch of the held-out prompts with a blank image."""
    timed = [p.text for kind in ("harmful", "harmless") for p in read_prompts(kind)[:_TIMED]]
    inputs = model_inputs(vlm.model, vlm.processor, timed, [blank_image()] * len(timed))
    found = generation_ratio(vlm.model, inputs, guard)
    return {"median": found.median, "low": found.low, "high": found.high}
