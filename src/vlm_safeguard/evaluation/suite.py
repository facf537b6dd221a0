"""The suite: a plan's answers by inspect-ai, then all that is computed from them.

What is done is kept: inspect's logs hold finished samples, `answers.jsonl` every batch that was
generated, `measured.jsonl` what was computed afterwards. A run that is killed goes on from there,
in the same batches, and ends with the same table.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inspect_ai
import torch
from inspect_ai.hooks import Hooks, SampleEnd, hooks
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Model, get_model

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.afterwards import Report, measure_answers, measure_model
from vlm_safeguard.evaluation.answers.logs import answered
from vlm_safeguard.evaluation.answers.models import ModelName, loaded_vlm
from vlm_safeguard.evaluation.answers.provider import PROVIDER
from vlm_safeguard.evaluation.asks.conditions import illustrated
from vlm_safeguard.evaluation.plan import BenchmarkPlan, Plan
from vlm_safeguard.evaluation.results.comparisons import comparisons
from vlm_safeguard.evaluation.results.counting import agreement, closed_gates, rows, unreadable
from vlm_safeguard.evaluation.results.folder import write_results, write_samples
from vlm_safeguard.evaluation.results.frontier import Setting, Sweep, frontier
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.provenance import RunRecord
from vlm_safeguard.evaluation.results.ratios import cost_ratios
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.tasks import TASKS, Asked, chosen
from vlm_safeguard.loading import load_guard
from vlm_safeguard.model.conversation import pictures

if TYPE_CHECKING:
    from inspect_ai import Task

_ATTEMPTS = 1  # times a failed sample, and a failed task, is tried again


def run(
    plan: Plan, out: Path, *, command: str = "", report: Report = lambda what, done, total: None
) -> Results:
    """Carry out a plan, or go on with it, and write results.json, samples.jsonl, gap.json, guard/.

    Args:
        out: the output's folder; a run into the same folder takes what is there.
        command: what was typed, for the provenance.
        report: told about progress.

    Raises:
        SafeguardError: data, models or the guard cannot be used, or an answer could not be made;
            what was done by then is kept.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # before any model: data that is missing is told at once
    asked = {benchmark.name: _chosen(plan, benchmark) for benchmark in plan.benchmarks}
    swept = sum(len(_chosen(plan, benchmark)) for benchmark in _frontier_benchmarks(plan))
    report("the model", 0, 1)
    _prepare_guard(plan, out)
    total = sum(
        len(asked[benchmark.name])
        for defence in plan.defences
        for benchmark, _ in plan.asks(defence)
    )
    if plan.frontier:
        each = len(plan.frontier.settings()) * len(plan.frontier.conditions)
        total += each * swept
    _Progress.start(total, report)
    lines: list[Line] = []
    for defence in plan.defences:
        lines += _answers(plan, out, defence, plan.asks(defence))
    settings = _frontier(plan, out)
    images = _save_images(plan, asked, out)
    lines = [line.model_copy(update={"image": images.get(line.place)}) for line in lines]

    divergence, time_ratio = measure_model(plan, asked, out, report)
    lines = measure_answers(plan, lines, out, report)
    first = "default" if "default" in plan.defences else plan.defences[0]
    results = Results(
        model=plan.model,
        rows=rows(lines) + divergence,
        time_ratio=time_ratio["median"],
        time_ratio_range=(time_ratio["low"], time_ratio["high"]),
        closed_gates=closed_gates(lines),
        cost_ratios=cost_ratios(lines),
        comparisons=comparisons(lines, first),
        agreement=agreement(lines),
        frontier=settings,
        unreadable=unreadable(lines),
        provenance=RunRecord(
            command=command,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 1),
            seed=plan.seed,
            versions={
                name: version(name)
                for name in ("vlm-safeguard", "torch", "transformers", "inspect-ai")
            },
            machine={
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "device": _device(plan.device),
            },
            plan=plan.model_dump(mode="json"),
        ),
    )
    write_samples(out, lines)
    write_results(out, results)
    return results


def _chosen(plan: Plan, benchmark: BenchmarkPlan) -> Asked:
    return chosen(benchmark.name, benchmark.path, benchmark.limit or plan.limit, plan.seed)


# --- answers ---


def _answers(
    plan: Plan,
    out: Path,
    defence: str,
    asks: Sequence[tuple[BenchmarkPlan, str]],
    **tuning: Any,
) -> list[Line]:
    """A defence's answers to what it is asked, made or taken from the logs.

    Raises:
        SafeguardError: a sample failed, after its retries.
    """
    if not asks:
        return []
    name = "-".join([defence, *(f"{knob}={value:g}" for knob, value in tuning.items())])
    tasks: list[Task] = [
        TASKS[benchmark.name](
            condition=condition,
            path=benchmark.path,
            limit=benchmark.limit or plan.limit,
            seed=plan.seed,
            judges=",".join(benchmark.judges or plan.judge_names),
            max_tokens=plan.max_new_tokens,
        )
        for benchmark, condition in asks
    ]
    _Progress.enter(name, sum(len(task.dataset) for task in tasks))
    roles = _roles(plan)
    done, logs = inspect_ai.eval_set(
        tasks,
        log_dir=str(out / "logs" / name),
        model=get_model(
            f"{PROVIDER}/{plan.model}",
            memoize=False,
            defence=defence,
            guard=None if defence == "none" else str(out / "guard"),
            dtype=plan.dtype,
            device=plan.device,
            batch_size=plan.batch_size,
            journal=str(out / "answers.jsonl"),
            **tuning,
        ),
        model_roles=roles or None,
        max_tasks=1,
        max_connections=2 * plan.batch_size,
        max_samples=2 * plan.batch_size,
        retry_attempts=_ATTEMPTS,
        retry_on_error=_ATTEMPTS,
        continue_on_fail=True,
        log_images=False,
        log_dir_allow_dirty=True,  # a plan may ask for less than an earlier one
        display="none",
        ctl_server=False,
    )
    if not done:
        raise SafeguardError(
            f"Not every answer of '{name}' could be made: {_why(logs)} Run the same command again "
            f"to go on; the samples are in {out / 'logs' / name} (inspect view)."
        )
    _Progress.leave()
    order = [(benchmark.name, condition) for benchmark, condition in asks]
    return sorted(
        answered(logs, defence),
        key=lambda line: order.index((line.benchmark, line.condition)),
    )


def _roles(plan: Plan) -> dict[str, str | Model]:
    """The judges that are models."""
    roles: dict[str, str | Model] = {}
    local: dict[str, Any] = {
        "dtype": plan.dtype,
        "device": plan.device,
        "batch_size": plan.batch_size,
    }
    names = {
        "llama-guard": plan.moderator and f"{PROVIDER}/{plan.moderator}",
        "grader": plan.grader if "rubric" in plan.judge_names else None,
    }
    for role, name in names.items():
        if name is not None:
            given = local if name.startswith(f"{PROVIDER}/") else {}
            roles[role] = get_model(name, **given)
    return roles


def _why(logs: Sequence[EvalLog]) -> str:
    """What the first log that failed says."""
    for log in logs:
        if log.status == "success":
            continue
        samples = read_eval_log(log.location).samples or []
        failed = [(f"sample {each.id}", each.error) for each in samples if each.error]
        where, error = failed[0] if failed else ("the task", log.error)
        said = (error.message if error else f"it was {log.status}").strip().splitlines()[0]
        return f"{log.eval.task}, {where}: {said.rstrip('.')}."
    return "no log says why."


@hooks(name="vlm_safeguard_progress", description="Tells the suite of each sample that is done.")
class _Progress(Hooks):
    """Counts samples; those taken from the logs count once their defence is through."""

    tell: Report | None = None
    what, done, total, base, size = "", 0, 0, 0, 0

    @classmethod
    def start(cls, total: int, tell: Report) -> None:
        cls.tell, cls.total, cls.done, cls.base, cls.size = staticmethod(tell), total, 0, 0, 0

    @classmethod
    def enter(cls, what: str, size: int) -> None:
        cls.what, cls.base, cls.size, cls.done = what, cls.base + cls.size, size, 0
        cls._say()

    @classmethod
    def leave(cls) -> None:
        cls.done = cls.size
        cls._say()

    @classmethod
    def _say(cls) -> None:
        if cls.tell is not None:
            cls.tell(cls.what, cls.base + min(cls.done, cls.size), cls.total)

    def enabled(self) -> bool:
        return self.tell is not None

    async def on_sample_end(self, data: SampleEnd) -> None:
        type(self).done += 1
        self._say()


# --- the guard, the frontier, pictures ---


def _prepare_guard(plan: Plan, out: Path) -> None:
    """Put the guard into the output's folder: the one that was named, or one fitted now.

    Raises:
        SafeguardError: the folder holds answers made with another guard.
    """
    folder, origin = out / "guard", out / "guard" / "origin.json"
    source = json.dumps([plan.model, plan.dtype, plan.guard])
    if origin.is_file():
        if origin.read_text("utf-8") != source:
            raise SafeguardError(
                f"{out} holds an evaluation of another model or guard; name a new folder."
            )
        return
    vlm = loaded_vlm(ModelName(plan.model, plan.dtype, plan.device))
    named = None if plan.guard is None else Path(plan.guard)
    guard = load_guard(named, plan.model, vlm.model, vlm.processor)
    guard.check_fits(vlm.backbone)
    guard.save_pretrained(folder)
    origin.write_text(source, "utf-8")  # last: a folder that has it is whole


def _frontier_benchmarks(plan: Plan) -> list[BenchmarkPlan]:
    """What the frontier asks, with the data that the plan names."""
    if plan.frontier is None:
        return []
    paths = {benchmark.name: benchmark.path for benchmark in plan.benchmarks}
    return [
        BenchmarkPlan(
            name=name,
            path=paths.get(name),
            limit=plan.frontier.limit,
            conditions=plan.frontier.conditions,
            defences=None,
            judges=plan.frontier.judges,
        )
        for name in (plan.frontier.attack, plan.frontier.benign)
    ]


def _frontier(plan: Plan, out: Path) -> list[Setting]:
    """Attack success and over-refusal of the default guard at every setting."""
    if plan.frontier is None:
        return []
    asks = [(b, condition) for b in _frontier_benchmarks(plan) for condition in b.conditions]
    points = [
        Sweep(knob, setting, condition, [line for line in lines if line.condition == condition])
        for knob, setting in plan.frontier.settings()
        for lines in [_answers(plan, out, "default", asks, **{knob: setting})]
        for condition in plan.frontier.conditions
    ]
    return frontier(points, plan.frontier.judges or plan.judge_names)


def _save_images(plan: Plan, asked: dict[str, Asked], out: Path) -> dict[tuple[str, str, str], str]:
    """Every picture that was shown, once, and which sample it belongs to."""
    folder = out / "images"
    folder.mkdir(exist_ok=True)
    found = {}
    for benchmark in plan.benchmarks:
        for condition in benchmark.conditions:
            for number, sample in asked[benchmark.name]:
                shown = pictures(illustrated(sample, number, condition))
                if not shown:
                    continue
                mark = hashlib.sha256(repr(shown[0].size).encode() + shown[0].tobytes())
                path = folder / f"{mark.hexdigest()[:20]}.png"
                if not path.exists():
                    shown[0].save(path)
                found[benchmark.name, condition, sample.id] = f"images/{path.name}"
    return found


def _device(name: str) -> str:
    return torch.cuda.get_device_name(name) if name.startswith("cuda") else name
