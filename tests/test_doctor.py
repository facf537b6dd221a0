"""The doctor finds what is wrong, says what it saw, and needs no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.reference import small_guard
from tiny import load_makers
from vlm_safeguard.doctor import Examination
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.families import FAMILIES

pytestmark = pytest.mark.xdist_group("doctor")  # they share a process
#: Runs the command with each of several lists of arguments, where no socket can be opened.
_BLOCKED = """
import json, socket, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("a socket was opened")

socket.socket = NoSocket
socket.create_connection = socket.getaddrinfo = NoSocket
from vlm_safeguard.cli import main

runs = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["vlm-safeguard", "doctor", *arguments, "--offline", "--json"]
    code, out, err = 0, StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            code = left.code
    runs.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(runs))
"""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a small random LLaVA."""
    model, processor = load_makers()["llava"]()
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Done(NamedTuple):
    """What came of one run of the command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def offline_runs(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Done]:
    """Of a folder with its guard, and of a name on the Hub, in one process without sockets."""
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    guard = tmp_path_factory.mktemp("guard")
    small_guard(model, LlavaProcessor.from_pretrained(llava)).save_pretrained(guard)
    commands = [[str(llava), "--guard", str(guard)], ["somebody/some-model"]]
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (Done(*each) for each in json.loads(done.stdout))
    return first, second


def test_offline_with_a_guard_no_socket_is_opened(
    llava: Path, offline_runs: tuple[Done, Done]
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    done, _ = offline_runs
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["passed"]
    assert "the guard fits" in [check["name"] for check in report["checks"]]
    facts, backbone = report["facts"], Backbone.of(model)
    assert facts["decoder"] == backbone.decoder_path
    assert facts["layers"] == len(backbone.layers)
    assert facts["image tokens"] == sorted(backbone.placeholder_ids)
    assert facts["chat template"] == facts["guard"]["chat template"]
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    assert 0 < report["time_ratio"]["low"] <= report["time_ratio"]["median"]


def test_a_hub_name_offline_is_an_error_not_a_download(offline_runs: tuple[Done, Done]) -> None:
    _, done = offline_runs
    assert done.code == 1
    assert "There is no model 'somebody/some-model' on this machine" in done.err
    assert "a socket was opened" not in done.err


def test_a_guard_of_another_model_does_not_fit(llava: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    guard = small_guard(model, processor)
    model.get_input_embeddings().weight.data.mul_(1.5)
    outcomes = {check.name: check for check in Examination(model, processor, guard).run()}
    assert not outcomes["the guard fits"].passed
    assert "other weights" in outcomes["the guard fits"].detail


def test_another_chat_template_does_not_fit(llava: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    guard = small_guard(model, processor)
    assert isinstance(processor.chat_template, str)
    processor.chat_template = processor.chat_template.replace("USER", "PERSON") + " "
    outcomes = {check.name: check for check in Examination(model, processor, guard).run()}
    assert not outcomes["the guard fits"].passed
    assert "another chat template" in outcomes["the guard fits"].detail


def test_a_layer_that_undoes_an_edit_is_found() -> None:
    model: Any
    model, processor = load_makers()["llava"]()
    layers = model.model.language_model.layers
    layers[2].register_forward_hook(lambda m, args, out: args[0])  # undoes the layer and its hook
    outcomes = {check.name: check for check in Examination(model, processor).run()}
    assert outcomes["decoder layers"].passed
    assert not outcomes["hooks act"].passed
    assert "[2]" in outcomes["hooks act"].detail


def test_an_unknown_type_is_examined_and_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "llava")
    model, processor = load_makers()["llava"]()
    examination = Examination(model, processor)
    assert all(check.passed for check in examination.run())
    assert examination.facts()["type"] == "llava"
    assert "llava" not in FAMILIES
