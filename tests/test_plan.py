"""Plans: what they hold, and how a mistake in one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_safeguard.defences.table import NAMES
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.plan import Plan, plan_of, read_plan
from vlm_safeguard.loading import Loading

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALL: dict[str, Any] = {"benchmarks": [{"name": "harmful"}]}


def test_what_is_left_out_has_its_usual_value() -> None:
    plan = plan_of({"benchmarks": [{"name": "harmful"}, {"name": "scenes"}]}, "here")
    assert (plan.model, plan.defences, plan.judges) == ("pocket", ("none", "default"), ("refusal",))
    assert [b.conditions for b in plan.benchmarks] == [("text",), ("own",)]


def test_a_file_says_the_same_as_values(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("benchmarks:\n  - name: harmful\n    conditions: [text, blank]\nlimit: 5\n")
    facts = {"benchmarks": [{"name": "harmful", "conditions": ["text", "blank"]}], "limit": 5}
    assert read_plan(path) == plan_of(facts, "here")
    assert Plan.model_validate(read_plan(path).model_dump()) == read_plan(path)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "names neither a benchmark nor an attack"),
        (SMALL | {"defences": ["none", "magic"]}, "defences.1: there is no defence 'magic'"),
        ({"benchmarks": [{"name": "harmfull"}]}, "benchmarks.0.name: there is no benchmark"),
        (
            {"benchmarks": [{"name": "harmful", "conditions": ["blanc"]}]},
            "benchmarks.0.conditions.0: there is no image condition 'blanc'",
        ),
        ({"benchmarks": [{"name": "harmful", "conditions": ["own"]}]}, "no images of its own"),
        (SMALL | {"limit": 0}, "limit: Input should be greater"),
        (SMALL | {"modell": "pocket"}, "modell: Extra inputs"),
        (SMALL | {"dtype": "float4"}, "There is no dtype 'float4'"),
        (SMALL | {"device": "cpu", "device_map": "auto"}, "leave out --device, or --device-map"),
        (SMALL | {"judges": ["llama-guard"]}, "judges.0: llama-guard names its model"),
        (SMALL | {"judges": ["rubric"]}, "needs a grader"),
        (SMALL | {"grader": "pocket"}, "not named as inspect does"),
        (SMALL | {"judges": ["oracle"]}, "there is no judge 'oracle'"),
        (SMALL | {"probes": ["gap", "speed"]}, "probes.1: there is no probe 'speed'"),
        ({"benchmarks": [{"name": "harmful"}, {"name": "harmful"}]}, "named twice"),
        ({"benchmarks": [{"name": "harmful", "defences": ["ecso"]}]}, "defended by ecso"),
        ({"benchmarks": []}, "names neither a benchmark nor an attack"),
        (SMALL | {"attack": {"conditions": ["text"]}}, "attack: 'text' shows no image"),
        (SMALL | {"attack": {"epsilon": [256]}}, "attack.epsilon.0: Input should be less"),
        (SMALL | {"attack": {"attacks": ["gcg"]}}, "attack.attacks.0: Input should be 'pgd'"),
        (SMALL | {"frontier": {"attack": "nothing"}}, "frontier.attack: there is no benchmark"),
    ],
)
def test_a_mistake_is_told_by_its_fields_name(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(SafeguardError) as caught:
        plan_of(facts, "plan.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("plan.yaml: ")


@pytest.mark.parametrize(("text", "words"), [("a: [", "cannot be read"), ("- 1", "is no plan")])
def test_a_file_that_is_no_plan(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(SafeguardError, match=words):
        read_plan(path)
    with pytest.raises(SafeguardError, match="There is no plan"):
        read_plan(tmp_path / "nothing.yaml")


def test_judges_by_name() -> None:
    judges = ["refusal", "llama-guard=meta-llama/LlamaGuard-7b", "rubric"]
    plan = plan_of(SMALL | {"judges": judges, "grader": "openai/gpt-4o-mini"}, "here")
    assert plan.judge_names == ["refusal", "llama-guard", "rubric"]
    assert plan.moderator == "meta-llama/LlamaGuard-7b"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_plans(path: Path) -> None:
    plan = read_plan(path)
    assert {"none", "default"} <= set(plan.defences) <= set(NAMES)


def test_other_models_are_loaded_alike_but_for_what_is_the_models_own() -> None:
    facts = SMALL | {"dtype": "bfloat16", "load_in_4bit": True, "revision": "v1"}
    plan = plan_of(facts | {"trust_remote_code": True}, "here")
    assert plan.loading == Loading(
        dtype="bfloat16", load_in_4bit=True, revision="v1", trust_remote_code=True
    )
    assert plan.loading.for_another_model() == Loading(dtype="bfloat16", load_in_4bit=True)
    assert plan_of(SMALL, "here").loading == Loading()
