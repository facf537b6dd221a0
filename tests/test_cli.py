"""The command line, on a tiny model saved to a folder: what it prints, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from support.command import Finished, Run
from tiny.pocket import make_model
from vlm_safeguard.cli import ask, doctor, fit
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation import suite
from vlm_safeguard.evaluation.plan import Plan, plan_of
from vlm_safeguard.fit import further
from vlm_safeguard.guard import Guard
from vlm_safeguard.loading import Loading


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_guard(tmp_path_factory: pytest.TempPathFactory, guard: Guard) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    guard.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (50, 40), "red").save(path)
    return path


def fails_with(result: Finished, *words: str) -> None:
    assert result.code != 0
    assert "Traceback" not in result.err + result.out
    message = [line for line in result.err.splitlines() if line.startswith("vlm-safeguard: ")]
    assert len(message) == 1, result.err
    for word in words:
        assert word in message[0]


def test_fit_inspect_ask_in_a_row(
    run: Run, checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("further_pairs", "further_calibration"):  # fewer of each form, for speed
        every = getattr(further, name)
        monkeypatch.setattr(further, name, lambda *of, every=every: every(*of)[::12])
    folder = tmp_path / "guard"
    fitted = run(
        "fit", checkpoint, folder, "--layers", "2-3", "--rank", "2", "--span", "answer", "--json"
    )
    assert fitted.code == 0, fitted.err
    facts = json.loads(fitted.out)
    assert (facts["layers"], facts["rank"], facts["edit"]) == ("2–3", 2, "refuse")
    assert facts["edited tokens"] == "the request's, and the answer's"
    assert "text_discriminant" in facts["gate opens by"]
    assert facts["harmful anchors above text_discriminant, held out"].endswith("%")
    assert Image.open(folder / "guard.png").size[0] > 500

    shown = run("inspect", folder, "--json", "--figure", tmp_path / "again.png")
    assert shown.code == 0, shown.err
    again = json.loads(shown.out)
    assert {name: again[name] for name in facts} == facts
    assert len(again["held_out_auroc"]) == 6
    assert (tmp_path / "again.png").stat().st_size > 1000
    table = run("inspect", folder)
    assert table.code == 0
    assert "held-out AUROC" in table.out

    asked = run(
        "ask",
        "How to swim",
        "--image",
        picture,
        "--model",
        checkpoint,
        "--guard",
        folder,
        "--max-new-tokens",
        3,
        "--json",
    )
    assert asked.code == 0, asked.err
    answer = json.loads(asked.out)
    assert set(answer) == {"unguarded", "guarded", "receipt"}
    assert answer["receipt"]["images"] == 1
    panels = run(
        "ask", "How to swim", "--model", checkpoint, "--guard", folder, "--max-new-tokens", 3
    )
    assert panels.code == 0, panels.err
    assert "unguarded" in panels.out
    assert "Receipt" in panels.out


def test_no_such_model(run: Run) -> None:
    fails_with(run("fit", "/nowhere/model", "/tmp/never"), "There is no model '/nowhere/model'")


def test_not_a_vlm(run: Run, tmp_path: Path, processor: LlavaProcessor) -> None:
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    fails_with(run("fit", tmp_path, tmp_path / "out"), "not a vision-language model")


def test_unreadable_image(run: Run, checkpoint: Path, saved_guard: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake.png"
    fake.write_text("no picture")
    common = ["--model", checkpoint, "--guard", saved_guard]
    fails_with(run("ask", "What is it?", "--image", fake, *common), "cannot be read as an image")
    missing = tmp_path / "missing.png"
    fails_with(run("ask", "What is it?", "--image", missing, *common), "There is no image")


@pytest.mark.parametrize("question", ["", "   "])
def test_empty_question(run: Run, question: str) -> None:
    fails_with(run("ask", question), "The question is empty")


def test_guard_of_another_model(
    run: Run, tmp_path: Path, saved_guard: Path, processor: LlavaProcessor
) -> None:
    make_model(processor, seed=5).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    result = run("ask", "How to swim", "--model", tmp_path, "--guard", saved_guard)
    fails_with(result, "same shape but other weights")


def test_corrupt_and_missing_guards(run: Run, tmp_path: Path, guard: Guard) -> None:
    guard.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "guard.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails_with(run("inspect", tmp_path / "cut"), "corrupt")
    (tmp_path / "empty").mkdir()
    fails_with(run("inspect", tmp_path / "empty"), "is not a guard")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "ten"], "does not name layers"),
        (["--layers", "3-99"], "not all in 0–5"),
        (["--edit", "magic"], "There is no edit 'magic'"),
        (["--budget", "0"], "budget cannot be 0"),
        (["--anchors", "/nowhere.csv"], "There is no file /nowhere.csv"),
        (["--dtype", "float4"], "There is no dtype"),
        (["--device", "nowhere"], "cannot be used"),
        (["--device-map", "all"], "There is no device map 'all'"),
        (["--device", "cpu", "--device-map", "auto"], "leave out --device, or --device-map"),
        (["--load-in-4bit", "--load-in-8bit"], "in 4 bits or in 8"),
        (["--revision", "v1"], "is a folder, which has no revisions"),
    ],
)
def test_bad_options(
    run: Run, checkpoint: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    fails_with(run("fit", checkpoint, tmp_path / "out", *options), words)


@pytest.mark.parametrize("command", ["export", "train"])
def test_unknown_reference_vlm_is_named_with_those_there_are(
    run: Run, tmp_path: Path, command: str
) -> None:
    done = run("pocket", command, tmp_path / "new", "--model", "other")
    fails_with(done, "'other'; there are pocket, coder")
    assert not (tmp_path / "new").exists()


def test_export_does_not_overwrite(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    fails_with(run("pocket", "export", tmp_path), "is not empty")


@pytest.mark.parametrize(
    "command",
    [("fit", "MODEL", "OUT"), ("ask", "How to swim", "--model", "MODEL"), ("doctor", "MODEL")],
)
def test_what_loads_a_model_takes_every_option_of_loading(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    given: list[tuple[str, Loading]] = []

    def load(name: str, loading: Loading) -> None:
        given.append((name, loading))
        raise SafeguardError("It is known what was asked for.")

    for module in (ask, doctor, fit):
        monkeypatch.setattr(module, "load_model", load)
    options = ["--dtype", "float16", "--device", "cuda:1", "--load-in-8bit", "--revision", "v1"]
    fails_with(run(*command), "what was asked for")
    fails_with(run(*command, *options, "--trust-remote-code"), "what was asked for")
    fails_with(run(*command, "--device-map", "balanced", "--load-in-4bit"), "what was asked for")
    assert given == [
        ("MODEL", Loading()),
        (
            "MODEL",
            Loading(
                dtype="float16",
                device="cuda:1",
                load_in_8bit=True,
                revision="v1",
                trust_remote_code=True,
            ),
        ),
        ("MODEL", Loading(device_map="balanced", load_in_4bit=True)),
    ]


# --- eval: its options are a plan's fields ---


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that `eval` was about to carry out."""
    plans: list[Plan] = []

    def stop(plan: Plan, *_: object, **__: object) -> None:
        plans.append(plan)
        raise SafeguardError("Stopped here.")

    monkeypatch.setattr(suite, "run", stop)
    return plans


def test_every_field_of_a_plan_is_an_option_with_its_help_and_default(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = run("eval", "--help")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    singular = {
        "defences": "defence",
        "benchmarks": "benchmark",
        "judges": "judge",
        "probes": "probe",
    }
    for name, field in Plan.model_fields.items():
        if name in ("frontier", "attack"):
            continue
        flag = name if name == "model" else f"--{singular.get(name, name).replace('_', '-')}"
        line = next(line for line in lines if line.split()[1:2] == [flag])
        assert field.description is not None
        assert field.description in line
        default = None if field.is_required() else field.default
        if default not in (None, False, ()):
            values = default if isinstance(default, tuple) else (default,)
            assert f"[default: {', '.join(map(str, values))}]" in line


def test_options_and_a_file_say_the_same(run: Run, planned: list[Plan], tmp_path: Path) -> None:
    values = {
        "model": "coder",
        "guard": "a-guard",
        "defences": ["none", "ecso"],
        "benchmarks": [
            {"name": "harmful", "conditions": ["text", "blank"]},
            {"name": "pope", "path": "data/pope", "conditions": ["text", "blank"]},
        ],
        "judges": ["refusal", "rubric"],
        "grader": "openai/gpt-4o-mini",
        "probes": ["gap", "time"],
        "ppl_model": "other",
        "limit": 5,
        "seed": 3,
        "max_new_tokens": 9,
        "batch_size": 2,
        "dtype": "bfloat16",
        "device": "auto",
        "device_map": "sequential",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "revision": "v1",
        "trust_remote_code": True,
    }
    assert values.keys() == Plan.model_fields.keys() - {"frontier", "attack"}
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    options = [
        *("coder", "--guard", "a-guard", "--defence", "none", "--defence", "ecso"),
        *("--benchmark", "harmful", "--benchmark", "pope=data/pope"),
        *("--condition", "text", "--condition", "blank"),
        *("--judge", "refusal", "--judge", "rubric", "--grader", "openai/gpt-4o-mini"),
        *("--probe", "gap", "--probe", "time"),
        *("--ppl-model", "other", "--limit", 5, "--seed", 3, "--max-new-tokens", 9),
        *("--batch-size", 2, "--dtype", "bfloat16", "--device", "auto"),
        *("--device-map", "sequential", "--load-in-4bit", "--revision", "v1"),
        "--trust-remote-code",
    ]
    fails_with(run("eval", *options), "Stopped here")
    fails_with(run("eval", "--plan", path), "Stopped here")
    assert planned == [plan_of(values, "test")] * 2


def test_options_override_a_file_and_defaults_do_not(
    run: Run, planned: list[Plan], tmp_path: Path
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("benchmarks: [{name: harmful}]\nmodel: coder\nseed: 4\njudges: [refusal]\n")
    fails_with(run("eval", "--plan", path, "--limit", 2, "--seed", 0), "Stopped here")
    (plan,) = planned
    assert (plan.model, plan.limit, plan.seed) == ("coder", 2, 0)
    assert plan.benchmarks[0].name == "harmful"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "name a --benchmark, or give a --plan"),
        (["--condition", "blank"], "--condition goes with --benchmark"),
        (["--benchmark", "nothing"], "there is no benchmark 'nothing'"),
        (["--benchmark", "harmful", "--limit", 0], "limit: Input should be greater"),
        (["--plan", "/nowhere.yaml"], "There is no plan /nowhere.yaml"),
    ],
)
def test_a_plan_that_cannot_be(run: Run, options: list[object], words: str) -> None:
    fails_with(run("eval", *options), words)
