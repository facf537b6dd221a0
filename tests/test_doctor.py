"""The doctor finds what is wrong, says what it saw, and needs no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tiny import load_makers
from vlm_safeguard.doctor import Examination
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.families import FAMILIES

_BLOCKED = """
import socket, sys

class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("a socket was opened")

socket.socket = NoSocket
socket.create_connection = socket.getaddrinfo = NoSocket
from vlm_safeguard.cli import main
sys.argv = ["vlm-safeguard", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a small random LLaVA."""
    model, processor = load_makers()["llava"]()
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_doctor(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _BLOCKED, "doctor", *map(str, arguments), "--offline", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )


def fit_small(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Guard:
    return Guard.fit(
        model, processor, rank=4, budget=0.2, calibration=[f"How to count to {i}" for i in range(9)]
    )


def test_offline_with_a_guard_no_socket_is_opened(llava: Path, tmp_path: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    fit_small(model, processor).save_pretrained(tmp_path)
    done = run_doctor(llava, "--guard", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert "the guard fits" in [check["name"] for check in found["checks"]]
    facts, backbone = found["facts"], Backbone.of(model)
    assert facts["decoder"] == backbone.decoder_path
    assert facts["layers"] == len(backbone.layers)
    assert facts["image tokens"] == sorted(backbone.placeholder_ids)
    assert facts["chat template"] == facts["guard"]["chat template"]
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    assert 0 < found["time_ratio"]["low"] <= found["time_ratio"]["median"]


def test_a_hub_name_offline_is_an_error_not_a_download() -> None:
    done = run_doctor("somebody/some-model")
    assert done.returncode == 1
    assert "There is no model 'somebody/some-model' on this machine" in done.stderr
    assert "a socket was opened" not in done.stderr


def test_a_guard_of_another_model_does_not_fit(llava: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    guard = fit_small(model, processor)
    model.get_input_embeddings().weight.data.mul_(1.5)
    found = {check.name: check for check in Examination(model, processor, guard).run()}
    assert not found["the guard fits"].passed
    assert "other weights" in found["the guard fits"].detail


def test_another_chat_template_does_not_fit(llava: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    guard = fit_small(model, processor)
    assert isinstance(processor.chat_template, str)
    processor.chat_template = processor.chat_template.replace("USER", "PERSON") + " "
    found = {check.name: check for check in Examination(model, processor, guard).run()}
    assert not found["the guard fits"].passed
    assert "another chat template" in found["the guard fits"].detail


def test_a_layer_that_undoes_an_edit_is_found() -> None:
    model: Any
    model, processor = load_makers()["llava"]()
    layers = model.model.language_model.layers
    layers[2].register_forward_hook(lambda m, args, out: args[0])  # undoes the layer and its hook
    found = {check.name: check for check in Examination(model, processor).run()}
    assert found["decoder layers"].passed
    assert not found["hooks act"].passed
    assert "[2]" in found["hooks act"].detail


def test_an_unknown_type_is_examined_and_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "llava")
    model, processor = load_makers()["llava"]()
    examination = Examination(model, processor)
    assert all(check.passed for check in examination.run())
    assert examination.facts()["type"] == "llava"
    assert "llava" not in FAMILIES
