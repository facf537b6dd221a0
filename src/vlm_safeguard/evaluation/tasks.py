"""The benchmarks as inspect-ai's tasks: `inspect eval vlm_safeguard/<benchmark>`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Scorer
from inspect_ai.solver import generate

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.batches import Place
from vlm_safeguard.evaluation.answers.messages import messages_of
from vlm_safeguard.evaluation.asks.benchmarks.catalogue import BENCHMARKS
from vlm_safeguard.evaluation.asks.conditions import illustrated
from vlm_safeguard.evaluation.asks.samples import Sample
from vlm_safeguard.evaluation.judges.scorers import SCORERS, right

DEFAULT_TOKENS = 64
Asked = list[tuple[int, Sample]]  # samples with their places in the benchmark


def chosen(name: str, path: str | None = None, limit: int | None = None, seed: int = 0) -> Asked:
    """A benchmark's samples with their places in it; a limit draws that many at random.

    Raises:
        SafeguardError: there is no such benchmark, or its data cannot be read.
    """
    if name not in BENCHMARKS:
        raise SafeguardError(f"There is no benchmark '{name}'; there are {', '.join(BENCHMARKS)}.")
    samples = list(enumerate(BENCHMARKS[name].load(path)))
    if limit is None or limit >= len(samples):
        return samples
    return sorted(random.Random(seed).sample(samples, limit), key=lambda each: each[0])


def benchmark_task(
    name: str,
    *,
    condition: str | None = None,
    path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    judges: str | Sequence[str] = "refusal",
    max_tokens: int = DEFAULT_TOKENS,
) -> Task:
    """A benchmark under an image condition.

    Raises:
        SafeguardError: no such benchmark, condition or judge, or its data cannot be read.
    """
    wanted = judges.split(",") if isinstance(judges, str) else list(judges)
    if strange := [judge for judge in wanted if judge not in SCORERS]:
        raise SafeguardError(f"There is no judge {strange[0]}; there are {', '.join(SCORERS)}.")
    samples = chosen(name, path, limit, seed)
    shown = condition or BENCHMARKS[name].usual_condition
    kinds = {sample.kind for _, sample in samples}
    scorers: list[Scorer] = [right()] if "utility" in kinds else []
    if kinds - {"utility"}:
        scorers += [SCORERS[judge]() for judge in wanted]
    # near in length, near in the order: what shares a batch is then padded little
    samples.sort(key=lambda each: (len(each[1].text), each[0]))
    return Task(
        name=f"{name}-{shown.partition(':')[0]}",
        dataset=MemoryDataset(
            [
                InspectSample(
                    id=sample.id,
                    input=messages_of(
                        illustrated(sample, number, shown),
                        Place(f"{name}/{shown}", place, len(samples)),
                    ),
                    target=sample.answer or "",
                    metadata={
                        "benchmark": name,
                        "condition": shown,
                        "kind": sample.kind,
                        "category": sample.category,
                        "request": sample.text,
                        "choices": list(sample.choices),
                        "number": number,
                    },
                )
                for place, (number, sample) in enumerate(samples)
            ],
            name=name,
        ),
        solver=generate(),
        scorer=scorers,
        config=GenerateConfig(max_tokens=max_tokens),
    )


def _task_of(name: str) -> Callable[..., Task]:
    """The registered task of one benchmark."""

    def made(
        condition: str | None = None,
        path: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        judges: str | list[str] = "refusal",
        max_tokens: int = DEFAULT_TOKENS,
    ) -> Task:
        return benchmark_task(
            name,
            condition=condition,
            path=path,
            limit=limit,
            seed=seed,
            judges=judges,
            max_tokens=max_tokens,
        )

    made.__name__ = made.__qualname__ = name
    made.__doc__ = f"{BENCHMARKS[name].title}, under an image condition."
    registered: Callable[..., Task] = task(made)
    return registered


TASKS = {name: _task_of(name) for name in BENCHMARKS}
globals().update(TASKS)
