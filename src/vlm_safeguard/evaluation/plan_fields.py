"""What stands in a plan's fields: names that are known, in parts that hold nothing else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

JUDGES = ("refusal", "llama-guard", "rubric")
PROBES = ("gap", "time", "divergence", "perplexity")


def _known(name: str, names: Collection[str], what: str) -> str:
    if name not in names:
        raise ValueError(f"there is no {what} '{name}'; there are {', '.join(names)}")
    return name


def _benchmark(name: str) -> str:
    from vlm_safeguard.evaluation.asks.benchmarks.catalogue import BENCHMARKS

    return _known(name, BENCHMARKS, "benchmark")


def _condition(name: str) -> str:
    from vlm_safeguard.evaluation.asks.conditions import CONDITIONS, FOLDER

    return name if name.startswith(FOLDER) else _known(name, CONDITIONS, "image condition")


def _defence(name: str) -> str:
    from vlm_safeguard.defences.table import NAMES

    return _known(name, NAMES, "defence")


def _judge(judge: str) -> str:
    name, _, model = judge.partition("=")
    _known(name, JUDGES, "judge")
    if (name == "llama-guard") != bool(model):
        raise ValueError(
            "llama-guard names its model, as in llama-guard=meta-llama/LlamaGuard-7b; the "
            "rubric's is the grader, and refusal has none"
        )
    return judge


def _probe(name: str) -> str:
    return _known(name, PROBES, "probe")


BenchmarkName = Annotated[str, AfterValidator(_benchmark)]
Condition = Annotated[str, AfterValidator(_condition)]
DefenceName = Annotated[str, AfterValidator(_defence)]
JudgeName = Annotated[str, AfterValidator(_judge)]
ProbeName = Annotated[str, AfterValidator(_probe)]


class Part(BaseModel):
    """A part of a plan, all of whose fields are known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
