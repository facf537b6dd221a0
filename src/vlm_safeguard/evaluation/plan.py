"""What an evaluation measures: one object, from the command line or a YAML file.

Its fields are the command line's options, so that importing it loads no model's library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.attack_plan import AttackPlan
from vlm_safeguard.evaluation.plan_fields import (
    PROBES,
    BenchmarkName,
    Condition,
    DefenceName,
    JudgeName,
    Part,
    ProbeName,
)
from vlm_safeguard.loading import Loading
from vlm_safeguard.loading.fields import loading_field, loading_of, validated

Knob = Literal["strength", "threshold"]


class BenchmarkPlan(Part):
    """One benchmark and how it is shown."""

    name: BenchmarkName = Field(description="A benchmark of the catalogue.")
    path: str | None = Field(None, description="A local copy, or a data set on the Hub.")
    conditions: tuple[Condition, ...] = Field(
        (),
        description="text, blank, noise, image, own, typographic or folder:DIR; by default its own "
        "images where it has some, else text.",
    )
    limit: int | None = Field(None, ge=1, description="Samples at most.")
    defences: tuple[DefenceName, ...] | None = Field(
        None, description="Only these; all if left out."
    )
    judges: tuple[str, ...] | None = Field(
        None, description="Only these, without their models; all if left out."
    )

    @model_validator(mode="after")
    def _usual_condition(self) -> Self:
        from vlm_safeguard.evaluation.asks.benchmarks.catalogue import BENCHMARKS

        benchmark = BENCHMARKS[self.name]
        if "own" in self.conditions and not benchmark.own_images:
            raise ValueError(f"'{self.name}' has no images of its own to show as 'own'")
        if not self.conditions:
            object.__setattr__(self, "conditions", (benchmark.usual_condition,))
        return self


class FrontierPlan(Part):
    """The default guard with one setting moved: what it lets through, and what it refuses."""

    strength: tuple[float, ...] = Field((), description="Of the edit, λ.")
    threshold: tuple[float, ...] = Field((), description="Added to the gate's thresholds.")
    attack: BenchmarkName = Field("harmful", description="The benchmark of harmful requests.")
    benign: BenchmarkName = Field("harmless", description="The benchmark of harmless requests.")
    conditions: tuple[Condition, ...] = Field(("blank",), min_length=1)
    limit: int | None = Field(None, ge=1, description="Samples of each at most.")
    judges: tuple[str, ...] | None = Field(
        None, description="Only these, without their models; all if left out."
    )

    def settings(self) -> list[tuple[Knob, float]]:
        """(knob, setting), one after the other."""
        return [
            *(("strength", value) for value in self.strength),
            *(("threshold", value) for value in self.threshold),
        ]


class Plan(Part):
    """An evaluation: a model, how it is defended, what it is asked, and who judges the answers."""

    model: str = Field(
        "pocket", description="'pocket', 'coder', a Hugging Face Hub id, or a checkpoint folder."
    )
    guard: str | None = Field(None, description="A guard's folder or Hub id; fitted if left out.")
    defences: tuple[DefenceName, ...] = Field(
        ("none", "default"), min_length=1, description="What is compared: none, default, …"
    )
    benchmarks: tuple[BenchmarkPlan, ...] = Field(
        (), description="NAME or NAME=PATH (a local copy, or a Hub data set)."
    )
    judges: tuple[JudgeName, ...] = Field(
        ("refusal",), min_length=1, description="refusal, llama-guard=MODEL or rubric."
    )
    grader: str | None = Field(
        None,
        description="Who grades by rubric, as inspect names it: openai/…, vlm-safeguard/MODEL, …",
    )
    probes: tuple[ProbeName, ...] = Field(
        PROBES, description="What is measured besides answers: gap, time, divergence, perplexity."
    )
    ppl_model: str | None = Field(
        None, description="Scores the answers' perplexity; the model's own LLM if left out."
    )
    limit: int | None = Field(None, ge=1, description="Samples of each benchmark; all if left out.")
    seed: int = Field(0, description="Draws the samples where there is a limit.")
    max_new_tokens: int = Field(64, ge=1, description="Length of the answers.")
    batch_size: int = Field(16, ge=1, description="Requests at once.")
    dtype: str = loading_field("dtype")
    device: str = loading_field("device")
    device_map: str | None = loading_field("device_map")
    load_in_4bit: bool = loading_field("load_in_4bit")
    load_in_8bit: bool = loading_field("load_in_8bit")
    revision: str | None = loading_field("revision")
    trust_remote_code: bool = loading_field("trust_remote_code")
    frontier: FrontierPlan | None = Field(
        None, description="The default guard with one setting moved."
    )
    attack: AttackPlan | None = Field(None, description="Attacks that know the defence.")

    @model_validator(mode="after")
    def _can_be_loaded_so(self) -> Self:
        try:
            self.loading  # noqa: B018  (checked when it is made)
        except SafeguardError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.benchmarks and self.attack is None:
            raise ValueError("it names neither a benchmark nor an attack, so nothing is asked")
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
            if unknown := set(benchmark.defences or ()) - set(self.defences):
                raise ValueError(
                    f"'{benchmark.name}' is to be defended by {', '.join(sorted(unknown))}, which "
                    "the plan's defences do not hold"
                )
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError("a benchmark is named twice; give it several conditions instead")
        return self

    @property
    def loading(self) -> Loading:
        """How the model is loaded; others are, too, but for what is of its repository alone."""
        return loading_of(self)

    @property
    def judge_names(self) -> list[str]:
        """The judges without their models."""
        return [judge.partition("=")[0] for judge in self.judges]

    @property
    def moderator(self) -> str | None:
        """The model that judges as Llama Guard does."""
        models = [judge.partition("=")[2] for judge in self.judges if "=" in judge]
        return models[0] if models else None

    @property
    def frontier_judges(self) -> Sequence[str]:
        """The judges of the frontier's answers, without their models."""
        return (self.frontier and self.frontier.judges) or self.judge_names

    def frontier_benchmarks(self) -> list[BenchmarkPlan]:
        """What the frontier asks, with the data that the plan names."""
        if self.frontier is None:
            return []
        paths = {benchmark.name: benchmark.path for benchmark in self.benchmarks}
        return [
            BenchmarkPlan(
                name=name,
                path=paths.get(name),
                limit=self.frontier.limit,
                conditions=self.frontier.conditions,
                defences=None,
                judges=self.frontier.judges,
            )
            for name in (self.frontier.attack, self.frontier.benign)
        ]

    def asks(self, defence: str) -> list[tuple[BenchmarkPlan, str]]:
        """What a defence is asked: benchmarks with their conditions, in the plan's order."""
        return [
            (benchmark, condition)
            for benchmark in self.benchmarks
            if benchmark.defences is None or defence in benchmark.defences
            for condition in benchmark.conditions
        ]


def plan_of(values: dict[str, Any], where: str) -> Plan:
    """A plan from plain values.

    Args:
        where: they come from, for messages.

    Raises:
        SafeguardError: what is wrong in it, by the field's name.
    """
    return validated(Plan, values, where)


def read_plan(path: Path) -> Plan:
    """A plan from a YAML file.

    Raises:
        SafeguardError: no such file, no YAML, or what is wrong in it, by the field's name.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SafeguardError(f"There is no plan {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SafeguardError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SafeguardError(f"{path} is no plan: it has to hold names and values.")
    return plan_of(values, str(path))
