"""The suite: a plan's answers by inspect-ai, then all that is computed from them.

What is done is kept: inspect's logs hold finished samples, `answers.jsonl` every batch that was
generated, `measured.jsonl` what was measured besides. A run that is killed goes on from there, in
the same batches, and ends with the same table.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from vlm_safeguard.defences.variants import tuned
from vlm_safeguard.evaluation.answers.defended import defended_answers
from vlm_safeguard.evaluation.answers.guard import prepare_guard
from vlm_safeguard.evaluation.answers.progress import Progress, Report, following
from vlm_safeguard.evaluation.asks.ask import Ask, asks_of
from vlm_safeguard.evaluation.attacks.campaign import Campaign
from vlm_safeguard.evaluation.plan import BenchmarkPlan, Plan
from vlm_safeguard.evaluation.probes.measurements import Measurements
from vlm_safeguard.evaluation.results.attacks import attack_shares
from vlm_safeguard.evaluation.results.comparisons import comparisons
from vlm_safeguard.evaluation.results.counting import (
    agreement,
    closed_gates,
    refusal_judge,
    rows,
    unreadable,
)
from vlm_safeguard.evaluation.results.folder import (
    write_attacked,
    write_gap,
    write_results,
    write_samples,
)
from vlm_safeguard.evaluation.results.frontier import Sweep, frontier
from vlm_safeguard.evaluation.results.images import save_images
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.provenance import RunRecord
from vlm_safeguard.evaluation.results.ratios import cost_ratios
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import DEFAULT
from vlm_safeguard.loading import Loading, find_device

_PACKAGES = ("vlm-safeguard", "torch", "transformers", "inspect-ai")  # that decide the answers


def run(
    plan: Plan, out: Path, *, command: str = "", report: Report = lambda what, done, total: None
) -> Results:
    """Carry out a plan, or go on with it, and write results.json, samples.jsonl and guard/.

    The gap, where the plan has that measured, is in gap.json.

    Args:
        out: the output's folder; a run into the same folder takes what is there.
        command: what was typed, for the provenance.
        report: called with (what is running, parts done, parts in all).

    Raises:
        SafeguardError: data, models or the guard cannot be used, or an answer could not be made;
            what was done by then is kept.
    """
    started = datetime.now(UTC)
    clock = time.monotonic()
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # before any model: what is wrong with the data is known at once
    asks = _asks(plan, plan.benchmarks)
    total = _count(plan, asks, _asks(plan, plan.frontier_benchmarks()))
    campaign = Campaign(plan, plan.attack, out, report) if plan.attack else None
    total += campaign.answers if campaign else 0
    report("the model", 0, 1)
    guard = prepare_guard(plan, out)
    for knob, value in plan.frontier.settings() if plan.frontier else ():
        tuned(guard, **{knob: value})  # before any answer: what cannot be set is known at once
    with following(Progress(total, report)) as progress:
        lines: list[Line] = []
        for defence in plan.defences:
            lines += defended_answers(plan, out, defence, plan.asks(defence), progress)
        sweeps = _sweeps(plan, out, progress)
        attacked = campaign.lines(progress) if campaign else []
    settings = frontier(sweeps, plan.frontier_judges)
    images = save_images(asks, out)
    measurements = Measurements(plan, out, report)
    if "gap" in plan.probes:
        write_gap(out, measurements.gap())
    time_ratio = measurements.time_ratio() if "time" in plan.probes else None
    harmless = _asked_of(plan, DEFAULT, asks) if "divergence" in plan.probes else []
    divergence = measurements.divergence(harmless)
    lines = [line.model_copy(update={"image": images.get(line.place)}) for line in lines]
    if "perplexity" in plan.probes:
        lines = measurements.with_likelihoods(lines)
    first = DEFAULT if DEFAULT in plan.defences else plan.defences[0]
    results = Results(
        model=plan.model,
        rows=rows(lines) + divergence,
        time_ratio=time_ratio.median if time_ratio else 0,
        time_ratio_range=(time_ratio.low, time_ratio.high) if time_ratio else None,
        closed_gates=closed_gates(lines),
        cost_ratios=cost_ratios(lines),
        comparisons=comparisons(lines, first),
        agreement=agreement(lines),
        frontier=settings,
        attacks=attack_shares(attacked),
        unreadable=unreadable(lines),
        refusal_judge=refusal_judge([*lines, *attacked]),
        provenance=RunRecord(
            command=command,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 1),
            seed=plan.seed,
            versions={name: version(name) for name in _PACKAGES},
            machine={
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "device": _device(plan.loading),
            },
            plan=plan.model_dump(mode="json"),
        ),
    )
    write_samples(out, lines)
    if attacked:
        write_attacked(out, attacked)
    write_results(out, results)
    return results


def _asks(plan: Plan, benchmarks: Sequence[BenchmarkPlan]) -> list[Ask]:
    """What benchmarks ask, under each of their image conditions."""
    asks = []
    for benchmark in benchmarks:
        first, *others = benchmark.conditions
        limit = benchmark.limit or plan.limit
        drawn = asks_of(benchmark.name, first, path=benchmark.path, limit=limit, seed=plan.seed)
        asks += drawn
        asks += [replace(ask, condition=other) for other in others for ask in drawn]
    return asks


def _asked_of(plan: Plan, defence: str, asks: Sequence[Ask]) -> list[Ask]:
    """Those of the asks that a defence is asked; none where the plan does not hold it."""
    if defence not in plan.defences:
        return []
    cells = {(benchmark.name, condition) for benchmark, condition in plan.asks(defence)}
    return [ask for ask in asks if (ask.benchmark, ask.condition) in cells]


def _count(plan: Plan, asks: Sequence[Ask], swept: Sequence[Ask]) -> int:
    """Answers in all."""
    settings = len(plan.frontier.settings()) if plan.frontier else 0
    return sum(len(_asked_of(plan, each, asks)) for each in plan.defences) + settings * len(swept)


def _sweeps(plan: Plan, out: Path, progress: Progress) -> list[Sweep]:
    """The default guard's answers at every setting, apart by image condition."""
    if plan.frontier is None:
        return []
    asks = [
        (each, condition) for each in plan.frontier_benchmarks() for condition in each.conditions
    ]
    return [
        Sweep(knob, value, condition, [line for line in lines if line.condition == condition])
        for knob, value in plan.frontier.settings()
        for lines in [defended_answers(plan, out, DEFAULT, asks, progress, (knob, value))]
        for condition in plan.frontier.conditions
    ]


def _device(loading: Loading) -> str:
    device = find_device(loading.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
