"""What an evaluation measures: one object, from the command line or a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlm_safeguard.defences.table import NAMES
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.benchmarks.catalogue import BENCHMARKS
from vlm_safeguard.evaluation.asks.conditions import CONDITIONS, FOLDER
from vlm_safeguard.loading import check_dtype

JUDGES = ("refusal", "llama-guard", "rubric")


def _known(name: str, there: tuple[str, ...] | dict[str, Any], what: str) -> str:
    if name not in there:
        raise ValueError(f"there is no {what} '{name}'; there are {', '.join(there)}")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchmarkPlan(_Part):
    """One benchmark and how it is shown."""

    name: str = Field(description="A benchmark of the catalogue.")
    path: str | None = Field(None, description="A local copy, or a data set on the Hub.")
    conditions: tuple[str, ...] = Field((), description="Image conditions; its usual one if empty.")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Samples at most.")
    defences: tuple[str, ...] | None = Field(None, description="Only these; all if left out.")
    judges: tuple[str, ...] | None = Field(
        None, description="Only these, without their models; all if left out."
    )

    @field_validator("name")
    @classmethod
    def _there_is(cls, name: str) -> str:
        return _known(name, BENCHMARKS, "benchmark")

    @field_validator("conditions")
    @classmethod
    def _shows(cls, conditions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            each if each.startswith(FOLDER) else _known(each, CONDITIONS, "image condition")
            for each in conditions
        )

    @field_validator("defences")
    @classmethod
    def _defends(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return names and tuple(_known(name, NAMES, "defence") for name in names)

    @model_validator(mode="after")
    def _usual(self) -> Self:
        own = BENCHMARKS[self.name].own_images
        if "own" in self.conditions and not own:
            raise ValueError(f"'{self.name}' has no pictures of its own to show as 'own'")
        if not self.conditions:
            object.__setattr__(self, "conditions", ("own" if own else "text",))
        return self


class FrontierPlan(_Part):
    """The default guard with one setting moved: what it lets through, and what it refuses."""

    strength: tuple[float, ...] = Field((), description="Of the edit, λ.")
    threshold: tuple[float, ...] = Field((), description="Added to the gate's thresholds.")
    attack: str = Field("harmful", description="The benchmark of harmful requests.")
    benign: str = Field("harmless", description="The benchmark of harmless requests.")
    conditions: tuple[str, ...] = Field(("blank",), min_length=1)
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Samples of each at most.")
    judges: tuple[str, ...] | None = Field(
        None, description="Only these, without their models; all if left out."
    )

    @field_validator("attack", "benign")
    @classmethod
    def _there_is(cls, name: str) -> str:
        return _known(name, BENCHMARKS, "benchmark")

    @field_validator("conditions")
    @classmethod
    def _shows(cls, conditions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_known(each, CONDITIONS, "image condition") for each in conditions)

    def settings(self) -> list[tuple[str, float]]:
        """(knob, setting), one after the other."""
        return [
            *(("strength", value) for value in self.strength),
            *(("threshold", value) for value in self.threshold),
        ]


class Plan(_Part):
    """An evaluation: a model, how it is defended, what it is asked, and who judges the answers."""

    model: str = Field("pocket", description="'pocket', a Hub id, or a checkpoint folder.")
    dtype: str = Field("auto", description="Weights' type: auto, float32, bfloat16 or float16.")
    device: str = Field("cpu", description="Where the models run.")
    guard: str | None = Field(None, description="A guard's folder or Hub id; else fitted.")
    defences: tuple[str, ...] = Field(("none", "default"), min_length=1)
    benchmarks: tuple[BenchmarkPlan, ...] = Field(min_length=1)
    judges: tuple[str, ...] = Field(
        ("refusal",), min_length=1, description="'refusal', 'llama-guard=MODEL', 'rubric'."
    )
    grader: str | None = Field(
        None,
        description="Who grades by rubric, as inspect names it: openai/…, vlm-safeguard/<model>.",
    )
    ppl_model: str | None = Field(None, description="Scores the answers; the model's own LLM else.")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Samples of a benchmark.")
    seed: int = Field(0, description="Draws the samples where there is a limit.")
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    frontier: FrontierPlan | None = None

    @field_validator("dtype")
    @classmethod
    def _is_dtype(cls, dtype: str) -> str:
        try:
            check_dtype(dtype)
        except SafeguardError as error:
            raise ValueError(str(error)) from error
        return dtype

    @field_validator("defences")
    @classmethod
    def _defends(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_known(name, NAMES, "defence") for name in names)

    @field_validator("judges")
    @classmethod
    def _judges(cls, judges: tuple[str, ...]) -> tuple[str, ...]:
        for judge in judges:
            name, _, model = judge.partition("=")
            _known(name, JUDGES, "judge")
            if (name == "llama-guard") != bool(model):
                raise ValueError(
                    "llama-guard names its model, as in llama-guard=meta-llama/LlamaGuard-7b; the "
                    "rubric's is the grader, and refusal has none"
                )
        return judges

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "rubric" in self.judges and self.grader is None:
            raise ValueError("the judge 'rubric' needs a grader")
        if self.grader is not None and "/" not in self.grader:
            raise ValueError(
                f"the grader '{self.grader}' is not named as inspect does: openai/…, or "
                "vlm-safeguard/<model> for one that runs here"
            )
        for part in (*self.benchmarks, self.frontier):
            if part is not None and (unknown := set(part.judges or ()) - set(self.judge_names)):
                raise ValueError(
                    f"{', '.join(sorted(unknown))} is to judge, which the plan's judges do not hold"
                )
        for benchmark in self.benchmarks:
            if strange := set(benchmark.defences or ()) - set(self.defences):
                raise ValueError(
                    f"'{benchmark.name}' is to be defended by {', '.join(sorted(strange))}, which "
                    "the plan's defences do not hold"
                )
        twice = [benchmark.name for benchmark in self.benchmarks]
        if len(set(twice)) < len(twice):
            raise ValueError("a benchmark is named twice; give it several conditions instead")
        return self

    @property
    def judge_names(self) -> list[str]:
        """The judges without their models."""
        return [judge.partition("=")[0] for judge in self.judges]

    @property
    def moderator(self) -> str | None:
        """The model that judges as Llama Guard does."""
        models = [judge.partition("=")[2] for judge in self.judges if "=" in judge]
        return models[0] if models else None

    def asks(self, defence: str) -> list[tuple[BenchmarkPlan, str]]:
        """What a defence is asked: benchmarks with their conditions, in the plan's order."""
        return [
            (benchmark, condition)
            for benchmark in self.benchmarks
            if benchmark.defences is None or defence in benchmark.defences
            for condition in benchmark.conditions
        ]


def plan_of(facts: dict[str, Any], where: str) -> Plan:
    """A plan from plain values.

    Raises:
        SafeguardError: what is wrong in it, by the field's name.
    """
    try:
        return Plan.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise SafeguardError(f"{where}: {place + ': ' if place else ''}{said}") from error


def read_plan(path: Path) -> Plan:
    """A plan from a YAML file.

    Raises:
        SafeguardError: no such file, no YAML, or what is wrong in it, by the field's name.
    """
    try:
        facts = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SafeguardError(f"There is no plan {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SafeguardError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(facts, dict):
        raise SafeguardError(f"{path} is no plan: it has to hold names and values.")
    return plan_of(facts, str(path))
