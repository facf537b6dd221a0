"""The benchmarks as inspect-ai's tasks: `inspect eval vlm_safeguard/<benchmark>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Scorer
from inspect_ai.solver import generate

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.batches import Position
from vlm_safeguard.evaluation.answers.messages import messages_of
from vlm_safeguard.evaluation.asks.ask import Ask, asks_of
from vlm_safeguard.evaluation.asks.benchmarks.catalogue import BENCHMARKS
from vlm_safeguard.evaluation.judges.scorers import SCORERS, right

DEFAULT_TOKENS = 64


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
    asks = asks_of(name, condition, path=path, limit=limit, seed=seed)
    shown = condition or BENCHMARKS[name].usual_condition
    return task_of(f"{name}-{shown.partition(':')[0]}", f"{name}/{shown}", asks, judges, max_tokens)


def task_of(
    name: str,
    place: str,
    asks: Sequence[Ask],
    judges: str | Sequence[str],
    max_tokens: int = DEFAULT_TOKENS,
) -> Task:
    """Asks as a task.

    Args:
        place: of the whole set, by which its answers are kept.

    Raises:
        SafeguardError: no such judge.
    """
    wanted = judges.split(",") if isinstance(judges, str) else list(judges)
    if unknown := [judge for judge in wanted if judge not in SCORERS]:
        raise SafeguardError(f"There is no judge {unknown[0]}; there are {', '.join(SCORERS)}.")
    kinds = {ask.sample.kind for ask in asks}
    scorers: list[Scorer] = [right()] if "utility" in kinds else []
    if kinds - {"utility"}:
        scorers += [SCORERS[judge]() for judge in wanted]
    # near in length, near in the order: what shares a batch is then padded little
    ordered = sorted(asks, key=lambda ask: (len(ask.sample.text), ask.number))
    return Task(
        name=name,
        dataset=MemoryDataset(
            [
                InspectSample(
                    id=ask.sample.id,
                    input=messages_of(ask.chat(), Position(place, number, len(ordered))),
                    target=ask.sample.answer or "",
                    metadata=ask.record().model_dump(mode="json"),
                )
                for number, ask in enumerate(ordered)
            ],
            name=name,
        ),
        solver=generate(),
        scorer=scorers,
        config=GenerateConfig(max_tokens=max_tokens),
    )


def _task_of(name: str) -> Callable[..., Task]:
    """The registered task of one benchmark."""

    def benchmark(
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

    benchmark.__name__ = benchmark.__qualname__ = name
    benchmark.__doc__ = f"{BENCHMARKS[name].title}, under an image condition."
    registered: Callable[..., Task] = task(benchmark)
    return registered


TASKS = {name: _task_of(name) for name in BENCHMARKS}
globals().update(TASKS)
