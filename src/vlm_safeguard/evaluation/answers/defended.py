"""A plan's answers under one defence: made by inspect-ai, or taken from its logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inspect_ai
from inspect_ai.model import get_model

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.logs import answered, first_failure
from vlm_safeguard.evaluation.answers.provider import PROVIDER
from vlm_safeguard.evaluation.judges.roles import model_roles
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from inspect_ai import Task

    from vlm_safeguard.evaluation.answers.progress import Progress
    from vlm_safeguard.evaluation.plan import BenchmarkPlan, Knob, Plan

_ATTEMPTS = 1  # times a failed sample, and a failed task, is tried again


def defended_answers(
    plan: Plan,
    out: Path,
    defence: str,
    asks: Sequence[tuple[BenchmarkPlan, str]],
    progress: Progress,
    setting: tuple[Knob, float] | None = None,
) -> list[Line]:
    """One line an answer, judged, in the order of the asks.

    Args:
        out: the evaluation's folder, whose guard is taken.
        asks: benchmarks with an image condition each.
        setting: of the default guard, where it is not to be its own.

    Raises:
        SafeguardError: a sample failed, after its retries.
    """
    if not asks:
        return []
    name = defence if setting is None else f"{defence}-{setting[0]}={setting[1]:g}"
    tasks = [_task(plan, benchmark, condition) for benchmark, condition in asks]
    lines = answers_to(tasks, plan, out, defence, name, progress, setting)
    order = [(benchmark.name, condition) for benchmark, condition in asks]
    return sorted(lines, key=lambda line: order.index((line.benchmark, line.condition)))


def answers_to(
    tasks: Sequence[Task],
    plan: Plan,
    out: Path,
    defence: str,
    name: str,
    progress: Progress,
    setting: tuple[Knob, float] | None = None,
) -> list[Line]:
    """One line an answer to a defence's tasks, judged.

    Args:
        name: of the logs' folder.

    Raises:
        SafeguardError: a sample failed, after its retries.
    """
    moved: dict[str, Any] = dict([setting] if setting else [])
    logs_folder = out / "logs" / name
    progress.start(name, sum(len(task.dataset) for task in tasks))
    done, logs = inspect_ai.eval_set(
        list(tasks),
        log_dir=str(logs_folder),
        model=get_model(
            f"{PROVIDER}/{plan.model}",
            memoize=False,
            defence=defence,
            guard=None if defence == "none" else str(out / "guard"),
            batch_size=plan.batch_size,
            journal=str(out / "answers.jsonl"),
            **asdict(plan.loading),
            **moved,
        ),
        model_roles=model_roles(plan, out) or None,
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
            f"Not every answer of '{name}' could be made: {first_failure(logs)} Run the same "
            f"command again to go on; the samples are in {logs_folder} (inspect view)."
        )
    progress.finish()
    return list(answered(logs, defence))


def _task(plan: Plan, benchmark: BenchmarkPlan, condition: str) -> Task:
    return TASKS[benchmark.name](
        condition=condition,
        path=benchmark.path,
        limit=benchmark.limit or plan.limit,
        seed=plan.seed,
        judges=",".join(benchmark.judges or plan.judge_names),
        max_tokens=plan.max_new_tokens,
    )
