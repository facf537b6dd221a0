"""The artifact: fitted as defined, saved and loaded without loss, refused where it does not fit."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import (
    QUESTIONS,
    ask,
    centred,
    run_row,
    same_receipt,
    text_ids,
    with_thresholds,
)
from tiny.pocket import make_model, make_processor
from vlm_safeguard.anchors import Anchor, fingerprint, shipped_anchors, shipped_calibration
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, meaningless_image
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.policy.artifact import CONFIG_NAME, FORMAT, WEIGHTS_NAME
from vlm_safeguard.policy.directions import (
    choose_layers,
    fit_directions,
    legible_layers,
    random_basis,
)
from vlm_safeguard.policy.edits import Project, Refuse, Restore
from vlm_safeguard.policy.gate import GATES, ImageScore, TextScore
from vlm_safeguard.policy.threshold import threshold_for

pytestmark = pytest.mark.versions

Model = LlavaForConditionalGeneration
ANCHORS = shipped_anchors()[:12]
ORDINARY = shipped_calibration()[:21]


@pytest.fixture(scope="module")
def small(exact_model: Model, processor: LlavaProcessor) -> Guard:
    """Few anchors and requests, fitted in float64, to be computed again by hand."""
    return Guard.fit(
        exact_model,
        processor,
        anchors=ANCHORS,
        calibration=ORDINARY,
        budget=0.2,
        batch_size=5,
        gate="calibrated",
    )


def last_states(model: Model, processor: LlavaProcessor, question: str) -> Tensor:
    states, _ = run_row(model, text_ids(processor, question))
    return torch.stack([state[-1] for state in states]).float()


def image_last_states(
    model: Model, processor: LlavaProcessor, question: str, picture: Any
) -> Tensor:
    prompt = f"<|im_start|>user\n<image>{question}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
    pixels = inputs["pixel_values"].double()
    states, _ = run_row(model, inputs["input_ids"][0].tolist(), pixels)
    return torch.stack([state[-1] for state in states]).float()


# --- fitting ---


def test_fit_equals_its_definition(
    exact_model: Model, processor: LlavaProcessor, small: Guard
) -> None:
    harmful = torch.stack([last_states(exact_model, processor, a.harmful) for a in ANCHORS])
    harmless = torch.stack([last_states(exact_model, processor, a.harmless) for a in ANCHORS])
    expected = fit_directions(harmful, harmless, len(ANCHORS))
    for name in ("vectors", "spectrum", "harmful_mean", "harmless_mean", "auroc"):
        torch.testing.assert_close(
            getattr(small.policy.directions, name), getattr(expected, name), rtol=1e-3, atol=1e-3
        )
    assert small.policy.layers == choose_layers(len(expected.auroc), 0.27, 0.9)
    assert small.policy.rank == len(ANCHORS)
    assert small.policy.edit == Refuse()
    assert small.policy.text_view == learn_text_view(
        processor, frozenset({processor.image_token_id})
    )
    assert small.policy.random_seed is None


def test_drift_is_the_mean_shift_by_a_blank_image(
    exact_model: Model, processor: LlavaProcessor, small: Guard
) -> None:
    shifts = []
    for text in (text for a in ANCHORS for text in (a.harmful, a.harmless)):
        blank = image_last_states(exact_model, processor, text, blank_image())
        shifts.append(blank - last_states(exact_model, processor, text))
    expected = sum(shifts) / len(shifts)
    torch.testing.assert_close(small.policy.drift, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("legible", [True, False])
def test_gate_is_calibrated_on_harmless_requests(
    exact_model: Model, processor: LlavaProcessor, legible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The multimodal pass is looked at only where harm is legible up to the first edited layer."""
    questions = ["What does the sign say?", "How many birds are there?", "Is this a fork?"]
    monkeypatch.setattr(
        "vlm_safeguard.fit.questions.shipped_image_questions", lambda: list(questions)
    )
    small = Guard.fit(
        exact_model,
        processor,
        anchors=ANCHORS,
        calibration=ORDINARY,
        budget=0.2,
        legible=0.0 if legible else 1.1,
        gate="calibrated",
    )
    count = len(ORDINARY)
    by_text, looks = small.policy.criterion(TextScore), small.policy.criterion(ImageScore)
    assert small.policy.gate == ((by_text, looks) if legible else (by_text,))
    assert by_text is not None
    assert by_text.layers == legible_layers(small.policy.directions, small.policy.layers, 0.02)
    share = 0.1 if legible else 0.2  # half the budget each, or all of it
    assert (by_text.budget, by_text.calibrated_on) == (share, count)
    text, image = [], []

    def score(request: str) -> float:
        states = last_states(exact_model, processor, request)
        return sum(centred(small, states[n], n) for n in by_text.layers) / len(by_text.layers)

    for number, request in enumerate(ORDINARY):
        text.append(score(request))
        if looks is not None:
            picture = meaningless_image(number)
            states = image_last_states(exact_model, processor, request, picture)
            image.append(centred(small, states[looks.layer], looks.layer))
    assert small.scores["calibration"].tolist() == pytest.approx(text, abs=1e-3)
    by_requests = threshold_for(small.scores["calibration"], share)
    by_questions = max(map(score, questions))
    assert by_text.threshold == pytest.approx(max(by_requests, by_questions), abs=1e-4)
    assert sum(each > by_requests for each in small.scores["calibration"].tolist()) == (
        math.floor(share * (count + 1)) - 1
    )
    if looks is not None:
        before = small.policy.directions.auroc[: small.policy.layers[0] + 1]
        assert before[looks.layer] == before.max()
        assert small.scores["calibration_image"].tolist() == pytest.approx(image, abs=1e-3)
        assert looks.threshold == threshold_for(small.scores["calibration_image"], share)
    else:
        assert "calibration_image" not in small.scores


def test_anchors_scores_are_held_out(small: Guard) -> None:
    assert small.scores["harmful"].shape == small.scores["harmless"].shape == (len(ANCHORS),)
    # What the directions were fitted on would score +1 and −1 on average, exactly.
    assert abs(float(small.scores["harmful"].mean()) - 1) > 1e-3


def test_what_is_asked_for_is_done(model: Model, processor: LlavaProcessor) -> None:
    guard = Guard.fit(
        model,
        processor,
        anchors=ANCHORS,
        calibration=ORDINARY,
        budget=0.4,
        edit=Restore(0.5),
        layers=[1, 4],
        rank=10,
        gate="calibrated",
    )
    assert (guard.policy.edit, guard.policy.layers, guard.policy.rank) == (Restore(0.5), (1, 4), 10)
    assert guard.policy.directions.rank == 10
    assert guard.policy.criterion(TextScore).layers == legible_layers(  # type: ignore[union-attr]
        guard.policy.directions, (1, 4), 0.02
    )


def test_provenance(model: Model, processor: LlavaProcessor, small: Guard) -> None:
    made = small.provenance
    template = json.dumps(processor.chat_template, sort_keys=True)
    assert made.chat_template_sha256 == hashlib.sha256(template.encode()).hexdigest()
    assert made.model_type == "llava"
    assert made.architecture == "LlavaForConditionalGeneration"
    assert (made.hidden_size, made.num_layers) == (32, 6)
    assert model.get_submodule(made.decoder_path) is model.model.language_model
    assert (made.anchor_pairs, made.anchors_sha256) == (len(ANCHORS), fingerprint(ANCHORS))
    assert (made.calibration_requests, made.calibration_sha256) == (21, fingerprint(ORDINARY))
    assert made.versions["torch"] == torch.__version__
    assert set(made.versions) == {"vlm-safeguard", "torch", "transformers"}


def test_fitting_leaves_the_model_alone(processor: LlavaProcessor) -> None:
    model = make_model(processor)
    before = {name: len(m._forward_hooks) for name, m in model.model.language_model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    Guard.fit(
        model, processor, anchors=ANCHORS, calibration=ORDINARY, budget=0.2, gate="calibrated"
    )
    after = {name: len(m._forward_hooks) for name, m in model.model.language_model.named_modules()}
    assert after == before
    assert not model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": ANCHORS[:7]}, "7 anchor pairs are too few"),
        ({"rank": 13}, "12 anchor pairs are too few for 13"),
        ({"rank": 0}, "rank cannot be 0"),
        ({"budget": 0.0}, "budget cannot be 0.0"),
        ({"budget": 1.0}, "budget cannot be 1.0"),
        ({"budget": 0.04}, "cannot be calibrated: .* needs at least [24][49] harmless"),
        ({"depth": 3}, "depth cannot be 3: extra inputs are not permitted"),
        ({"layers": []}, "Layers"),
        ({"layers": [2, 6]}, r"Layers \[2, 6\] are not all in 0–5"),
        ({"layers": [3, 2]}, "Layers"),
        ({"layers": [2, 2]}, "Layers"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    model: Model, processor: LlavaProcessor, options: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"anchors": ANCHORS, "calibration": ORDINARY, "budget": 0.2}
    settings["gate"] = "calibrated"  # the default one is calibrated on shipped requests, too
    with pytest.raises(SafeguardError, match=message):
        Guard.fit(model, processor, **settings | options)


def test_models_and_processors_that_cannot_be_used_are_refused(processor: LlavaProcessor) -> None:
    model = make_model(processor)
    with pytest.raises(SafeguardError, match="training mode"):
        Guard.fit(model.train(), processor)
    model.eval()
    with pytest.raises(SafeguardError, match="cannot read a conversation with 1 images"):
        Guard.fit(model, make_processor("{{ messages[0]['content'][-1]['text'] }}"))
    model.model.language_model.layers[3].mlp.down_proj.weight.data[0] = float("inf")
    with pytest.raises(SafeguardError, match="not finite"):
        Guard.fit(model, processor, anchors=ANCHORS, calibration=ORDINARY, budget=0.2)


# --- saving and loading ---


def generate(model: Model, guard: Guard, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Any]]:
    with guard.attach(model):
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokens, guard.receipts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": GATES["open"], "edit": Restore(0.5, one_sided=False), "rank": 2},
        {"refusal_prefix": (7, 8), "other_prefixes": ((9, 8), (5, 6, 7))},
        {"gate": GATES["paper"], "edit": Project(), "random_seed": 4, "layers": (1, 2, 3)},
    ],
    ids=["fitted", "restore", "languages", "control"],
)
def test_what_is_loaded_is_what_was_saved(
    model: Model, processor: LlavaProcessor, guard: Guard, tmp_path: Path, changes: dict[str, Any]
) -> None:
    saved = guard.variant(**changes)
    saved.save_pretrained(tmp_path / "new" / "guard")
    loaded = Guard.from_pretrained(tmp_path / "new" / "guard")
    for field in fields(saved.policy.directions):
        name, value = field.name, getattr(saved.policy.directions, field.name)
        assert torch.equal(getattr(loaded.policy.directions, name), value)
    assert loaded.scores.keys() == saved.scores.keys()
    assert all(torch.equal(loaded.scores[name], saved.scores[name]) for name in saved.scores)
    assert torch.equal(loaded.policy.drift, saved.policy.drift)
    kept, known = (each.fingerprint.tensors() for each in (saved, loaded))
    assert kept.keys() == known.keys()
    assert all(torch.equal(kept[name], known[name]) for name in kept)
    numbers = ("layers", "rank", "edit", "gate", "text_view", "random_seed")
    for name in (*numbers, "refusal_prefix", "other_prefixes"):
        assert getattr(loaded.policy, name) == getattr(saved.policy, name)
    assert loaded.provenance == saved.provenance
    inputs = ask(processor, QUESTIONS)
    first, second = (generate(model, one, inputs) for one in (saved, loaded))
    assert torch.equal(first[0], second[0])
    for left, right in zip(first[1], second[1], strict=True):
        same_receipt(left, right)


def test_a_gate_that_does_not_look_at_the_image_is_kept(guard: Guard, tmp_path: Path) -> None:
    gate = with_thresholds(guard, 0.5).policy.gate
    guard.variant(gate=gate).save_pretrained(tmp_path)
    assert Guard.from_pretrained(tmp_path).policy.gate == gate


def test_the_folder_is_readable_and_has_no_pickle(guard: Guard, tmp_path: Path) -> None:
    guard.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_NAME, CONFIG_NAME, "README.md"}
    config = json.loads((tmp_path / CONFIG_NAME).read_text("utf-8"))
    assert config["format"] == FORMAT
    assert config["edit"] == {"name": "refuse", "strength": 1.0, "span": "opening"}
    assert [each["name"] for each in config["gate"]] == ["text_score", "image_score"]
    assert config["gate"][0]["threshold"] == guard.policy.criterion(TextScore).threshold  # type: ignore[union-attr]
    assert config["policy_sha256"] == guard.policy.sha256()
    assert config["layers"] == list(guard.policy.layers)
    assert config["provenance"]["decoder_path"] == "model.language_model"
    assert config["held_out_auroc"] == pytest.approx(
        guard.policy.directions.auroc.tolist(), abs=1e-4
    )
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: vlm-safeguard\n")
    assert "base_model: LlavaForConditionalGeneration" in card
    assert "layers 2–3 of 6, rank 5" in card


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
        change(config)
        (folder / CONFIG_NAME).write_text(json.dumps(config), "utf-8")

    return apply


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return apply


def nan(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan"))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG_NAME).unlink(), f"not a guard: it has no {CONFIG_NAME}"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), WEIGHTS_NAME),
    "half a config": (cut(CONFIG_NAME), "cannot be read"),
    "half the weights": (cut(WEIGHTS_NAME), "corrupt"),
    "empty weights": (lambda f: (f / WEIGHTS_NAME).write_bytes(b""), "corrupt"),
    "bytes": (lambda f: (f / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "format": (
        edit_config(lambda c: c.update(format=FORMAT + 1)),
        f"has guard format {FORMAT + 1}",
    ),
    "unknown field": (edit_config(lambda c: c.update(colour="red")), "colour"),
    "missing field": (edit_config(lambda c: c.pop("layers")), "layers"),
    "edit": (edit_config(lambda c: c["edit"].update(name="remove")), "no edit 'remove'"),
    "parameter": (edit_config(lambda c: c["edit"].update(size=2)), "'refuse' does not take"),
    "gate": (edit_config(lambda c: c["gate"][0].update(name="ajar")), "gate"),
    "layer": (edit_config(lambda c: c.update(layers=[2, 6])), r"\[2, 6\]"),
    "rank": (edit_config(lambda c: c.update(rank=9)), "rank is 9"),
    "no layers": (edit_config(lambda c: c.update(layers=[])), "Layers"),
    "gate layer": (edit_config(lambda c: c["gate"][0].update(layers=[9])), "Layers"),
    "no gate layers": (edit_config(lambda c: c["gate"][0].update(layers=[])), "layer"),
    "threshold": (edit_config(lambda c: c["gate"][0].update(threshold=float("nan"))), "number"),
    "no criterion": (edit_config(lambda c: c.update(gate=[])), "gate"),
    "another threshold": (
        edit_config(lambda c: c["gate"][0].update(threshold=0.125)),
        "changed after it was saved",
    ),
    "strength": (edit_config(lambda c: c["edit"].update(strength="much")), "strength"),
    "tensor": (edit_tensors(lambda t: t.pop("drift")), "no tensor 'drift'"),
    "fingerprint": (
        edit_tensors(lambda t: t.pop("fingerprint.states")),
        "no tensor 'fingerprint.states'",
    ),
    "vectors": (edit_tensors(nan("vectors")), "not finite"),
    "mean": (edit_tensors(nan("harmful_mean")), "not finite"),
    "drift": (edit_tensors(nan("drift")), "not finite"),
    "scaled": (edit_tensors(lambda t: t["vectors"].mul_(2)), "not orthonormal"),
    "narrow": (edit_tensors(lambda t: t.update(drift=t["drift"][:, :7].clone())), "shape"),
    "flat": (edit_tensors(lambda t: t.update(vectors=t["vectors"][0].clone())), "shape|rank"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    guard.save_pretrained(tmp_path)
    Guard.from_pretrained(tmp_path)
    spoil, message = BROKEN[name]
    spoil(tmp_path)
    with pytest.raises(SafeguardError, match=message):
        Guard.from_pretrained(tmp_path)


def test_saving_again_replaces(guard: Guard, tmp_path: Path) -> None:
    guard.save_pretrained(tmp_path)
    guard.variant(rank=2).save_pretrained(str(tmp_path))
    assert Guard.from_pretrained(str(tmp_path)).policy.rank == 2


# --- fitting a model ---


@pytest.mark.parametrize("field", ["model_type", "hidden_size", "num_layers", "decoder_path"])
def test_each_mismatch_is_named(model: Model, guard: Guard, field: str) -> None:
    guard.check_fits(Backbone.of(model))
    value: Any = 7 if field in ("hidden_size", "num_layers") else "other"
    other = guard.variant(provenance=guard.provenance.model_copy(update={field: value}))
    with pytest.raises(SafeguardError, match=f"whose {field} is {value}"):
        other.check_fits(Backbone.of(model))


def test_image_tokens_have_to_match(model: Model, guard: Guard) -> None:
    backbone = Backbone.of(model)
    view = replace(guard.policy.text_view, placeholder_ids=frozenset({9}))
    with pytest.raises(SafeguardError, match=r"image tokens \[9\]"):
        guard.variant(text_view=view).check_fits(backbone)


def test_variants_do_not_share_what_they_change(
    model: Model, processor: LlavaProcessor, guard: Guard
) -> None:
    first = guard.variant(gate=GATES["open"])
    second = first.variant(rank=1)
    assert (first.policy.rank, second.policy.rank) == (guard.policy.rank, 1)
    assert (first.policy.gate, second.policy.gate) == (GATES["open"], GATES["open"])
    assert guard.policy.gate != GATES["open"]
    generate(model, first, ask(processor, QUESTIONS))
    assert (len(first.receipts), second.receipts) == (len(QUESTIONS), [])
    assert first.variant().receipts == []


def test_basis_is_the_directions_or_the_random_control(guard: Guard) -> None:
    assert torch.equal(guard.policy.basis(), guard.policy.directions.vectors)
    control = guard.variant(random_seed=3)
    assert torch.equal(control.policy.basis(), random_basis(guard.policy.directions, 3))
    assert control.policy.directions is guard.policy.directions  # the gate keeps the true ones


def test_the_controls_differ(model: Model, processor: LlavaProcessor, guard: Guard) -> None:
    """Literal projection, a random subspace, a flipped sign, and no guard: five results."""
    inputs = ask(processor, QUESTIONS)
    opened = guard.variant(gate=GATES["open"])
    with torch.no_grad():
        results = [model(**inputs).logits[:, -1]]
        for one in (
            opened,
            opened.variant(edit=Project()),
            opened.variant(random_seed=1),
            opened.variant(edit=Refuse(-1.0)),
        ):
            with one.attach(model):
                results.append(model(**inputs).logits[:, -1])
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert ((one - other).abs().amax(-1) > 1e-3).all()


# --- the Hub ---


class FakeApi:
    """Keeps what is uploaded in a folder."""

    folder: Path
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("api", {"token": token}))

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, **options: Any) -> str:
        self.calls.append(("upload", {"repo_id": repo_id, **options}))
        shutil.copytree(folder_path, self.folder)
        return f"https://hub/{repo_id}/commit/1"


def test_to_the_hub_and_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, guard: Guard) -> None:
    FakeApi.folder, FakeApi.calls = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    url = guard.push_to_hub("someone/guard", private=True, token="secret")
    assert url == "https://hub/someone/guard/commit/1"
    assert [name for name, _ in FakeApi.calls] == ["api", "create", "upload"]
    assert FakeApi.calls[0][1] == {"token": "secret"}
    created, uploaded = FakeApi.calls[1][1], FakeApi.calls[2][1]
    assert (created["repo_id"], created["private"]) == ("someone/guard", True)
    assert created["exist_ok"]
    assert created.get("repo_type", "model") == "model"
    assert uploaded["repo_id"] == "someone/guard"

    asked = []

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        asked.append((repo_id, filename, revision))
        return str(FakeApi.folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = Guard.from_pretrained("someone/guard", revision="v1")
    assert torch.equal(loaded.policy.directions.vectors, guard.policy.directions.vectors)
    assert {entry[1] for entry in asked} == {CONFIG_NAME, WEIGHTS_NAME}
    assert {(entry[0], entry[2]) for entry in asked} == {("someone/guard", "v1")}


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("bad name")])
def test_what_the_hub_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(SafeguardError, match=f"no folder 'someone/none'.*{error}"):
        Guard.from_pretrained("someone/none")


def test_anchor_pairs_are_not_sorted_or_shuffled(
    model: Model, processor: LlavaProcessor, small: Guard
) -> None:
    """Swapping the sides of every pair turns the direction: the pairing is what is used."""
    swapped = Guard.fit(
        model,
        processor,
        anchors=[Anchor(a.harmless, a.harmful) for a in ANCHORS],
        calibration=ORDINARY,
        budget=0.2,
        gate="calibrated",
    )
    torch.testing.assert_close(
        swapped.policy.directions.vectors[:, 0],
        -small.policy.directions.vectors[:, 0],
        rtol=1e-2,
        atol=1e-2,
    )
