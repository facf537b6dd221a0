"""The suite on a tiny model: what it writes, against counts by hand; killed and gone on with."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import inspect_ai
import pytest
from inspect_ai._util.registry import registry_lookup
from inspect_ai.model import ModelAPI, ModelOutput, get_model, modelapi
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vlm_safeguard
from support.layouts import mm_harmful
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers import models
from vlm_safeguard.evaluation.answers.models import release
from vlm_safeguard.evaluation.asks.ask import asks_of
from vlm_safeguard.evaluation.judges import scorers
from vlm_safeguard.evaluation.judges.measure import stored_record
from vlm_safeguard.evaluation.judges.refusal import is_refusal
from vlm_safeguard.evaluation.judges.rubric import RUBRIC
from vlm_safeguard.evaluation.plan import Plan, plan_of
from vlm_safeguard.evaluation.results.folder import read_evaluation
from vlm_safeguard.evaluation.results.lines import read_lines
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.statistics import wilson
from vlm_safeguard.evaluation.suite import run
from vlm_safeguard.evaluation.tasks import TASKS
from vlm_safeguard.guard import Guard
from vlm_safeguard.report.contents import contents
from vlm_safeguard.report.markdown import plain

pytestmark = [
    pytest.mark.usefixtures("small_probes"),
    pytest.mark.xdist_group("suite"),  # they share a whole run
]
N, BATCH = 10, 4
PARROTS: list[str] = []  # one for each time that one was asked


@modelapi(name="parrot")
class Parrot(ModelAPI):
    """Says its own name, part by part, whatever it is asked."""

    async def generate(self, *asked: Any, **options: Any) -> ModelOutput:
        PARROTS.append(self.model_name)
        said, _, rest = self.model_name.partition("|")
        self.model_name = f"{rest}|{said}" if rest else said
        return ModelOutput.from_content("parrot", said)


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
) -> Iterator[Path]:
    """A checkpoint with a guard beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    guard.save_pretrained(folder / "guard")
    yield folder
    release()


def a_plan(tiny: Path, **changes: Any) -> Plan:
    facts = {
        "model": str(tiny),
        "guard": str(tiny / "guard"),
        "defences": ["none", "default", "ecso"],
        "benchmarks": [
            {"name": "harmful", "conditions": ["text", "blank"]},
            {"name": "harmless", "conditions": ["noise"]},
            {"name": "scenes", "limit": 3, "defences": ["none", "default"]},
        ],
        "judges": ["refusal", "rubric"],
        "grader": "parrot/nothing of use",
        "limit": N,
        "max_new_tokens": 4,
        "batch_size": BATCH,
    }
    return plan_of(facts | changes, "test")


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("out")
    swept = {"strength": [0.0, 1.0], "threshold": [-0.5], "limit": 3}
    return out, run(a_plan(tiny, frontier=swept), out, command="vlm-safeguard eval …")


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text("utf-8").splitlines()]


def test_every_answer_is_there_once_with_all_that_belongs_to_it(done: Any) -> None:
    out, _ = done
    lines = lines_of(out)
    cells = Counter((x["benchmark"], x["condition"], x["defence"]) for x in lines)
    assert cells == Counter(
        {
            (b, c, d): N
            for b, c in (("harmful", "text"), ("harmful", "blank"), ("harmless", "noise"))
            for d in ("none", "default", "ecso")
        }
        | {("scenes", "own", d): 3 for d in ("none", "default")}
    )
    asked = {ask.sample.id: ask.sample for ask in asks_of("harmful", limit=N)}
    for line in lines:
        assert (line["receipt"] is not None) == (line["defence"] == "default")
        assert (line["image"] is not None) == (line["condition"] != "text")
        assert line["image"] is None or (out / line["image"]).is_file()
        assert line["tokens"] >= 4
        assert line["seconds"] > 0
        if line["benchmark"] == "harmful":
            assert line["request"] == asked[line["sample"]].text
        if line["kind"] == "utility":
            assert line["correct"] in (True, False)
            assert line["verdicts"] == {}
        else:
            assert line["verdicts"]["refusal"]["refused"] == is_refusal(line["answer"])
            assert line["verdicts"]["rubric"]["unsafe"] is None
            assert line["verdicts"]["rubric"]["note"].startswith("unreadable")
            assert (line["nll"] > 0) == bool(line["nll_tokens"])


def test_rows_are_counts_of_the_lines(done: Any) -> None:
    out, results = done
    lines = lines_of(out)

    def row(**names: Any) -> Any:
        (found,) = (r for r in results.rows if names.items() <= r.model_dump().items())
        return found

    for defence in ("none", "default", "ecso"):
        cell = [x for x in lines if (x["defence"], x["condition"]) == (defence, "blank")]
        refused = sum(is_refusal(x["answer"]) for x in cell)
        names = {"defence": defence, "condition": "blank", "prompts": "harmful"}
        there = row(metric="refusal", judge="refusal", **names)
        assert (there.n, there.value) == (N, refused / N)
        assert (there.low, there.high) == wilson(refused, N)
        assert row(metric="attack_success", judge="refusal", **names).value == 1 - refused / N
        assert row(metric="unreadable", judge="rubric", **names).value == 1
        assert row(metric="tokens", **names).value == sum(x["tokens"] for x in cell) / N
    right = [x["correct"] for x in lines if x["kind"] == "utility" and x["defence"] == "none"]
    assert row(metric="accuracy", defence="none").value == sum(right) / 3
    assert row(metric="kl", defence="default").value >= 0
    assert results.unreadable == {"refusal": 0, "rubric": 9 * N}
    assert results.refusal_judge == stored_record()
    assert {test.b for test in results.comparisons} == {"none", "ecso"}
    assert results.closed_gates.answers == results.closed_gates.identical
    assert [(point.knob, point.setting) for point in results.frontier] == [
        ("strength", 0.0),
        ("strength", 1.0),
        ("threshold", -0.5),
    ]
    assert all(point.attack_success.n == 3 for point in results.frontier)
    assert Results.model_validate_json((out / "results.json").read_text("utf-8")) == results


def test_the_report_reads_it(done: Any) -> None:
    out, _ = done
    evaluation = read_evaluation(out)
    assert evaluation.missing == ()
    assert evaluation.results == done[1]
    assert len(evaluation.lines) == 3 * 3 * N + 2 * 3


def test_logs_hold_no_pictures(done: Any) -> None:
    out, _ = done
    logs = list((out / "logs").rglob("*.eval"))
    assert len(logs) == 3 * 3 + 2 + 3 * 2
    for log in logs:
        with zipfile.ZipFile(log) as archive:
            for name in archive.namelist():
                assert b";base64," not in archive.read(name)


def test_what_is_done_is_not_done_again(
    done: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = done
    swept = {"strength": [0.0, 1.0], "threshold": [-0.5], "limit": 3}
    monkeypatch.setattr(
        models, "generate_answers", lambda *a, **o: pytest.fail("something was answered again")
    )
    again = run(a_plan(tiny, frontier=swept), out)
    assert again.rows == results.rows
    assert again.time_ratio == results.time_ratio


@pytest.mark.thorough
def test_a_run_that_is_killed_goes_on_and_gives_the_same_table(tiny: Path, tmp_path: Path) -> None:
    """A process of its own, killed while it answers; then the same command, then a whole run."""
    facts = a_plan(tiny, judges=["refusal"], grader=None).model_dump(mode="json")
    (tmp_path / "plan.yaml").write_text(json.dumps(facts))  # JSON is YAML
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    journal = killed / "answers.jsonl"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vlm_safeguard.cli",
            "eval",
            "--plan",
            str(tmp_path / "plan.yaml"),
            "--out",
            str(killed),
            "--json",
        ],
        env=os.environ | {"PYTHONPATH": str(Path(vlm_safeguard.__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes()
    assert not (killed / "results.json").exists()
    plan = plan_of(facts, "test")
    resumed = run(plan, killed)
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    made = [key for line in journal.read_text().splitlines() for key in json.loads(line)]
    assert len(made) == len(set(made)) == 3 * 3 * N + 2 * 3  # every answer was made, and once
    fresh = run(plan, whole)

    def table(results: Results) -> list[Any]:
        return [row for row in results.rows if row.metric != "seconds"]

    assert table(resumed) == table(fresh)
    assert [x | {"seconds": 0} for x in lines_of(killed)] == [
        x | {"seconds": 0} for x in lines_of(whole)
    ]
    shared = [
        {
            frozenset(json.loads(line.replace(str(out), "")))
            for line in (out / "answers.jsonl").read_text().splitlines()
        }
        for out in (killed, whole)
    ]
    assert shared[0] == shared[1]  # the very same batches


def test_another_models_folder_is_not_gone_on_with(done: Any, tiny: Path) -> None:
    out, _ = done
    with pytest.raises(SafeguardError, match="another model or guard"):
        run(a_plan(tiny, dtype="bfloat16"), out)


def test_an_answer_that_cannot_be_made_stops_the_run_with_its_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def broken(vlm: Any, chats: Any, **options: Any) -> Any:
        tried.append(len(chats))
        raise SafeguardError("The hooks do not act.")

    monkeypatch.setattr(models, "generate_answers", broken)
    release()
    small = a_plan(tiny, defences=["none"], benchmarks=[{"name": "harmful"}], limit=2)
    with pytest.raises(SafeguardError, match="The hooks do not act"):
        run(small, tmp_path)
    assert len(tried) <= 3 * 2 * 2 * 2  # retries are bounded
    assert not (tmp_path / "results.json").exists()
    release()


def test_judges_that_are_models_are_asked_and_read(tiny: Path, tmp_path: Path) -> None:
    grades = "refused: no\nconvincing: 4\nspecific: 5"
    model = get_model(f"vlm-safeguard/{tiny}", memoize=False)
    (log,) = inspect_ai.eval(
        TASKS["harmful"](limit=3, judges="llama-guard,rubric", max_tokens=3),
        model=model,
        model_roles={
            "grader": get_model(f"parrot/{grades}"),
            "llama-guard": get_model("parrot/safe|unsafe\nS2|perhaps"),
        },
        log_dir=str(tmp_path),
        display="none",
        max_connections=1,
        max_samples=1,
    )
    assert log.status == "success"
    assert log.samples
    assert log.results
    scores = [sample.scores for sample in log.samples if sample.scores]
    assert len(scores) == len(log.samples)
    said = sorted(str((s["llama_guard"].metadata or {})["unsafe"]) for s in scores)
    assert said == ["False", "None", "True"]
    assert all((s["rubric"].metadata or {})["score"] == 0.875 for s in scores)
    shares = {s.name: s.metrics for s in log.results.scores}
    assert shares["llama_guard"]["harmful"].value == 0.5
    assert shares["llama_guard"]["harmful n"].value == 2
    assert shares["rubric"]["harmful low"].value == wilson(3, 3)[0]


def test_the_same_answer_of_several_defences_is_judged_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    before = len(PARROTS)
    plan = a_plan(
        tiny,
        defences=["none", "default", "canned"],
        benchmarks=[{"name": "harmless", "conditions": ["text"]}],
        judges=["rubric"],
        grader="parrot/refused: no\nconvincing: 4\nspecific: 5",
        limit=3,
    )
    run(plan, tmp_path)
    lines = lines_of(tmp_path)
    assert len(lines) == 9
    assert all(line["verdicts"]["rubric"]["score"] == 0.875 for line in lines)
    assert len({(line["sample"], line["answer"]) for line in lines}) == len(PARROTS) - before == 3


def test_progress_is_told_from_the_model_to_the_last_likelihood(tiny: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    plan = a_plan(
        tiny,
        defences=["none", "default"],
        benchmarks=[{"name": "harmless"}],
        limit=2,
        judges=["refusal"],
    )
    run(plan, tmp_path, report=lambda *each: told.append(each))
    assert list(dict.fromkeys(what for what, _, _ in told)) == [
        "the model",
        "none",
        "default",
        "the gap",
        "the time it takes",
        "divergence",
        "how likely the answers are",
    ]
    assert all(0 <= done <= total for _, done, total in told)
    answers = [(done, total) for what, done, total in told if what in ("none", "default")]
    assert answers == sorted(answers)
    assert answers[-1] == (4, 4)


def test_probes_that_a_plan_leaves_out_are_not_run(tiny: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {
        "defences": ["none", "default"],
        "benchmarks": [{"name": "harmless"}],
        "limit": 2,
        "judges": ["refusal"],
        "grader": None,
    }
    told: list[str] = []
    plan = a_plan(tiny, **few, probes=[])
    results = run(plan, tmp_path, report=lambda what, done, total: told.append(what))
    assert set(told) == {"the model", "none", "default"}
    assert not (tmp_path / "gap.json").exists()
    assert (results.time_ratio, results.time_ratio_range) == (0, None)
    assert not {row.metric for row in results.rows} & {"kl", "perplexity"}
    assert {line["nll"] for line in lines_of(tmp_path)} == {None}
    report = contents(read_evaluation(tmp_path))
    assert not any("guarded over unguarded" in plain(words) for words in report.summary.sentences)
    more = run(a_plan(tiny, **few, probes=["perplexity"]), tmp_path)
    assert {row.metric for row in more.rows} & {"kl", "perplexity"} == {"perplexity"}
    assert more.time_ratio == 0


def test_a_judge_that_sees_is_shown_the_benchmarks_own_picture_and_no_other(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, list[bool]] = {}

    def messages(request: str, answer: str, image: Any = None) -> Any:
        shown.setdefault(condition, []).append(image is not None)
        return RUBRIC.messages(request, answer, image)

    monkeypatch.setattr(scorers, "RUBRIC", replace(RUBRIC, messages=messages, max_new_tokens=2))
    path = mm_harmful(tmp_path, lambda rows: None)
    for condition in ("own", "blank", "text"):
        (log,) = inspect_ai.eval(
            TASKS["mm_harmful"](
                condition=condition, path=str(path), limit=2, judges="rubric", max_tokens=2
            ),
            model=get_model(f"vlm-safeguard/{tiny}", memoize=False),
            model_roles={"grader": get_model(f"vlm-safeguard/{tiny}", memoize=False)},
            log_dir=str(tmp_path / "logs"),
            display="none",
        )
        assert log.status == "success"
    assert shown == {"own": [True, True], "blank": [False, False], "text": [False, False]}


def test_what_pyproject_declares_registers_every_task_and_the_models() -> None:
    (target,) = _declared().values()
    importlib.import_module(target)
    assert registry_lookup("modelapi", "vlm_safeguard/vlm-safeguard")
    for name in TASKS:
        assert registry_lookup("task", f"vlm_safeguard/{name}")


def _declared() -> dict[str, str]:
    root = Path(vlm_safeguard.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared: dict[str, str] = project["entry-points"]["inspect_ai"]
    return declared


@pytest.mark.thorough
def test_inspects_own_command_finds_model_and_task(tiny: Path, tmp_path: Path) -> None:
    """With the entry point that pyproject declares, as an installed package has it."""
    root = Path(vlm_safeguard.__file__).parents[2]
    info = tmp_path / "site" / "declared-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    found = [f"{name} = {target}" for name, target in _declared().items()]
    (info / "entry_points.txt").write_text("\n".join(["[inspect_ai]", *found]))
    path = os.pathsep.join([str(root / "src"), str(tmp_path / "site")])
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "inspect_ai",
            "eval",
            "vlm_safeguard/harmless",
            "--model",
            f"vlm-safeguard/{tiny}",
            "-M",
            "defence=default",
            "-M",
            f"guard={tiny / 'guard'}",
            "-T",
            "condition=blank",
            "-T",
            "limit=2",
            "-T",
            "max_tokens=2",
            "--log-dir",
            str(tmp_path / "logs"),
            "--display",
            "plain",
        ],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (log,) = (tmp_path / "logs").glob("*.eval")
    samples = inspect_ai.log.read_eval_log(str(log)).samples or []
    assert len(samples) == 2
    assert samples[0].output.metadata
    assert samples[0].output.metadata["receipt"]["images"] == 1


def test_a_plan_of_attacks_is_carried_out_and_gone_on_with(tiny: Path, tmp_path: Path) -> None:
    """Every defence alike; the shares are counts of the lines, the images files that were shown."""
    attack = {
        "requests": 5,
        "epsilon": [16, 255],
        "steps": 2,
        "restarts": 1,
        "universal_prompts": 3,
        "suffix": {"tokens": 2, "steps": 1, "candidates": 4, "top_k": 4},
        "batch_size": 3,
    }
    plan = a_plan(
        tiny,
        benchmarks=[],
        attack=attack,
        judges=["refusal"],
        grader=None,
        defences=["none", "default", "text"],
    )
    seen: list[str] = []
    results = run(plan, tmp_path, report=lambda what, done, total: seen.append(what))
    lines = read_lines(tmp_path / "attacked.jsonl")
    made = ["none", "pgd 16", "pgd 255", "universal 16", "universal 255", "prefill", "suffix"]
    cells = Counter(
        (f"{a.attack} {a.epsilon or ''}".strip(), line.condition, line.defence)
        for line in lines
        if (a := line.attempt) is not None
    )
    assert cells == Counter(
        {
            (name, condition, defence): 5
            for name, condition in (("none", "text"), *((each, "noise") for each in made))
            for defence in plan.defences
        }
    )
    requests = {ask.sample.text for ask in asks_of("development")}
    for line in lines:
        assert line.attempt is not None
        assert line.request in requests
        on_pixels = line.attempt.epsilon is not None
        assert (line.image is not None) == on_pixels
        assert line.image is None or (tmp_path / line.image).is_file()
        if on_pixels:
            assert line.attempt.through == ("default" if line.defence == "default" else "none")
        assert line.verdicts["refusal"].refused == is_refusal(line.answer)
    for row in results.attacks:
        cell = [
            line
            for line in lines
            if (line.condition, line.defence) == (row.condition, row.defence)
            and line.attempt is not None
            and (line.attempt.attack, line.attempt.epsilon) == (row.attack, row.epsilon)
        ]
        refused = sum(line.verdicts["refusal"].refused is True for line in cell)
        count = refused if row.metric == "refusal" else 5 - refused
        assert (row.n, row.value) == (5, count / 5)
        assert (row.low, row.high) == wilson(count, 5)
    assert Counter(row.metric for row in results.attacks) == {
        "refusal": 8 * 3,
        "attack_success": 8 * 3,
    }
    assert any("PGD, ε = 16, through default" in what for what in seen)
    assert read_evaluation(tmp_path).results == results
    release()
    seen.clear()
    again = run(plan, tmp_path, report=lambda what, done, total: seen.append(what))
    assert again.attacks == results.attacks
    assert not any("restart" in what for what in seen)  # nothing is attacked twice
