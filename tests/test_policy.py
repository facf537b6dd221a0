"""The policy: light to import, and its sha256 covers every number that decides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import QUESTIONS, ask, with_thresholds
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.edits import Restore
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span
from vlm_safeguard.policy.text_view import TextView

pytestmark = pytest.mark.versions

FORMAT_3 = Path(__file__).parent / "data" / "guard-format-3"


def test_importing_the_policy_loads_neither_transformers_nor_a_model() -> None:
    code = (
        "import pkgutil, importlib, sys, vlm_safeguard.policy as policy\n"
        "for each in pkgutil.iter_modules(policy.__path__, 'vlm_safeguard.policy.'):\n"
        "    importlib.import_module(each.name)\n"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert "vlm_safeguard.policy.policy" in loaded
    assert "vlm_safeguard.engines" not in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("transformers", "tokenizers")}
    assert not {name for name in loaded if name.startswith("vlm_safeguard.model")}


# --- what an answer begins with ---


def test_an_answer_begins_as_the_model_refuses_where_the_response_is_a_refusal(
    policy: Policy,
) -> None:
    """In one of the languages that it refuses in, where its next token is asked for."""
    refusing = replace(policy, response=Response.REFUSAL)
    assert refusing.beginnings == ((7, 8), (9, 8))
    assert replace(refusing, gate=GATES["open"]).beginnings == ((7, 8),)
    assert replace(refusing, refusal_prefix=(), other_prefixes=()).beginnings == ()
    assert replace(policy, response=Response.TEXT).beginnings == ()


# --- the sha256 ---


@pytest.fixture(scope="module")
def policy(guard: Guard) -> Policy:
    """With all kinds of fields set."""
    asked = with_thresholds(guard, 0.5, image=1.0, tokens=(7, 9))
    return asked.variant(refusal_prefix=(7, 8), other_prefixes=((9, 8),), random_seed=3).policy


def moved(value: Any) -> Any:
    """Another value of the same type, or a number in the place of none."""
    if value is None:
        return 1.5
    if isinstance(value, torch.Tensor):
        out = value.clone()
        out.view(-1)[-1] += 1e-3
        return out
    if isinstance(value, bool):
        return not value
    if isinstance(value, Span):
        return Span((value + 1) % 4)
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {**value, "other": (99_999,)}
    if isinstance(value, frozenset):
        return value | {99_999}
    assert isinstance(value, tuple)
    return (*value, 99_999)


def test_every_tensor_and_field_of_the_policy_is_in_its_sha256(policy: Policy) -> None:
    seen = {policy.sha256()}
    made = policy.directions
    changed: list[Policy] = [
        replace(policy, directions=replace(made, **{name: moved(getattr(made, name))}))
        for name in ("vectors", "harmful_mean", "harmless_mean")
    ]
    changed += [
        replace(policy, **{name: moved(getattr(policy, name))})
        for name in ("drift", "layers", "rank", "refusal_prefix", "other_prefixes", "random_seed")
    ]
    changed += [replace(policy, edit=Restore()), replace(policy, gate=policy.gate[:-1])]
    changed += [replace(policy, response=Response.TEXT)]
    changed += [
        replace(policy, edit=replace(policy.edit, **{f.name: moved(getattr(policy.edit, f.name))}))
        for f in fields(policy.edit)
    ]
    changed += [
        replace(
            policy,
            text_view=replace(
                policy.text_view, **{f.name: moved(getattr(policy.text_view, f.name))}
            ),
        )
        for f in fields(TextView)
    ]
    prompt = policy.generation_prompt
    assert prompt is not None
    changed += [
        replace(
            policy,
            generation_prompt=replace(prompt, **{f.name: moved(getattr(prompt, f.name))}),
        )
        for f in fields(GenerationPrompt)
    ]
    for place, criterion in enumerate(policy.gate):
        for name in type(criterion).model_fields:
            if name != "name":
                gate = [*policy.gate]
                gate[place] = criterion.model_copy(update={name: moved(getattr(criterion, name))})
                changed.append(replace(policy, gate=tuple(gate)))
    for other in changed:
        sha = other.sha256()
        assert sha not in seen
        seen.add(sha)


def test_the_sha256_of_the_same_policy_is_the_same(policy: Policy) -> None:
    """Whatever order its sets are written in, and not of what decides nothing."""
    view = policy.text_view
    turned = replace(view, placeholder_ids=frozenset(sorted(view.placeholder_ids, reverse=True)))
    assert replace(policy, text_view=turned).sha256() == policy.sha256()
    blind = replace(policy.directions, auroc=policy.directions.auroc * 0)
    assert replace(policy, directions=blind).sha256() == policy.sha256()


def test_receipts_name_the_policy_that_decided(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, guard: Guard
) -> None:
    with guard.attach(model):
        model.generate(**ask(processor, QUESTIONS), max_new_tokens=1, do_sample=False)
    assert {receipt.policy for receipt in guard.receipts} == {guard.policy.sha256()}


# --- what decides is saved ---


def test_the_options_of_the_fit_are_kept(guard: Guard, tmp_path: Path) -> None:
    guard.save_pretrained(tmp_path)
    kept = Guard.from_pretrained(tmp_path).provenance.options
    assert kept == guard.provenance.options == FitOptions(rank=5)


def test_a_guard_of_format_3_decides_and_answers_as_it_did(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """What the version that wrote it gave for the same requests is stored beside it.

    It read a refusal's words where the text's score said enough, too.
    """
    with pytest.warns(UserWarning, match="where this model's answers begin"):
        guard = Guard.from_pretrained(FORMAT_3)
    expected = json.loads((FORMAT_3 / "expected.json").read_text("utf-8"))
    assert guard.policy.edit.span is Span.OPENING
    assert len(guard.policy.refusal_prefix) == 3
    own = guard.policy.criterion(OwnRefusal)
    assert own is not None
    assert (own.slack, own.score_above) == (1.0, 0.0)
    assert guard.provenance.options is None
    with (
        pytest.warns(UserWarning, match=r"format 3.*abliterated.*not noticed"),
        guard.attach(model),
    ):
        answers = model.generate(**ask(processor, QUESTIONS), max_new_tokens=6, do_sample=False)
    assert answers[:, -6:].tolist() == expected["tokens"]
    for receipt, before in zip(guard.receipts, expected["receipts"], strict=True):
        assert receipt.guarded == before["guarded"]
        assert receipt.reason == before["reason"]
        names = ("own_refusal", "text_score", "image_score")
        scores = {name: before[name] for name in names if before[name] is not None}
        assert {name: receipt.scores[name] for name in scores} == pytest.approx(scores, rel=1e-4)
        assert not (set(names) - set(scores)) & set(receipt.scores)


def of_format_3(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> Path:
    config = json.loads((FORMAT_3 / "guard_config.json").read_text("utf-8"))
    change(config)
    (tmp_path / "guard_config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "guard.safetensors").write_bytes((FORMAT_3 / "guard.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("span", "hold", "expected"),
    [
        ("last", False, Span.LAST),
        ("request", False, Span.OPENING),
        ("request", True, Span.ANSWER),
    ],
)
def test_spans_of_format_3(tmp_path: Path, span: str, hold: bool, expected: Span) -> None:
    def change(config: dict[str, Any]) -> None:
        config["hold"], config["edit"]["span"] = hold, span

    assert Guard.from_pretrained(of_format_3(change, tmp_path)).policy.edit.span is expected


@pytest.mark.parametrize("name", ["paper", "open"])
def test_gates_of_format_3_that_are_not_calibrated(tmp_path: Path, name: str) -> None:
    folder = of_format_3(lambda config: config.update(gate={"name": name}), tmp_path)
    assert [criterion.name for criterion in Guard.from_pretrained(folder).policy.gate] == [name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c.update(hold=True), c["edit"].update(span="last")), "cannot do. Fit it again"),
        (lambda c: c.pop("hold"), "of format 3 but cannot be read"),
        (lambda c: c["gate"].pop("layers"), "of format 3 but cannot be read"),
        (lambda c: c.update(format=2), "has guard format 2"),
    ],
)
def test_what_of_format_3_cannot_be_read_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        Guard.from_pretrained(of_format_3(change, tmp_path))
