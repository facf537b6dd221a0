"""`vlm-safeguard serve`: its options, its documentation, and how the process ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from support.command import Finished, Run
from support.reference import QUESTIONS, ask
from support.serving import keep_logs_apart, openai_client, said, until
from tiny.pocket import make_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image
from vlm_safeguard.loading import kept_guard
from vlm_safeguard.policy import response
from vlm_safeguard.policy.response import Response
from vlm_safeguard.serving import server
from vlm_safeguard.serving.listening import listen
from vlm_safeguard.serving.settings import KEY_VARIABLE, ServeSettings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """The settings that `serve` was about to serve by."""
    given: list[ServeSettings] = []

    def stop(settings: ServeSettings) -> None:
        given.append(settings)
        raise SafeguardError("Stopped here.")

    monkeypatch.setattr(server, "serve", stop)
    return given


def fails_with(result: Finished, words: str) -> None:
    assert result.code == 1
    assert words in result.err
    assert "Traceback" not in result.err


def test_every_setting_is_an_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = " ".join(run("serve", "--help").out.split())
    singular = {"api_keys": "api-key", "allow_image_hosts": "allow-image-host"}
    for name, field in ServeSettings.model_fields.items():
        assert field.description is not None
        assert " ".join(field.description.split()) in shown
        if name != "model":
            assert f"--{singular.get(name, name).replace('_', '-')} " in shown


def test_options_and_a_file_say_the_same(
    run: Run, asked: list[ServeSettings], tmp_path: Path
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(
        'model = "pocket"\nresponse = "text"\nport = 0\napi_keys = ["a", "b"]\n'
        'allow_image_hosts = ["Example.org"]\nmax_batch = 5\nbatch_wait = 0.5\n'
        "load_in_4bit = true\n"
    )
    options = [
        *("pocket", "--response", "text", "--port", 0, "--api-key", "a", "--api-key", "b"),
        *("--allow-image-host", "Example.org", "--max-batch", 5, "--batch-wait", 0.5),
        "--load-in-4bit",
    ]
    fails_with(run("serve", *options), "Stopped here")
    fails_with(run("serve", "--config", path), "Stopped here")
    assert asked[0] == asked[1]
    assert asked[0].allow_image_hosts == ("example.org",)
    assert "'a'" not in repr(asked[0]), "keys are not shown"
    fails_with(run("serve", "coder", "--config", path, "--max-batch", 7), "Stopped here")
    assert (asked[2].model, asked[2].max_batch, asked[2].batch_wait) == ("coder", 7, 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "name a MODEL"),
        (["pocket", "--response", "never"], "there is no response 'never'"),
        (["pocket", "--port", 70000], "port: Input should be less"),
        (["pocket", "--max-batch", 0], "max_batch: Input should be greater"),
        (["pocket", "--max-batch", 2], "max_choices is more than max_batch"),
        (["pocket", "--allow-image-host", "https://example.org"], "is not a host's name"),
        (["pocket", "--api-key", ""], "an API key is empty"),
        (["pocket", "--dtype", "float4"], "There is no dtype"),
        (["pocket", "--config", "/nowhere.toml"], "There is no file /nowhere.toml"),
        (["/nowhere/model", "--port", 0], "There is no model '/nowhere/model'"),
        (["pocket", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    ],
)
def test_what_cannot_be_served(run: Run, options: list[object], words: str) -> None:
    fails_with(run("serve", *options), words)


def test_small_packets_of_a_connection_are_not_held_back() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_file_with_what_is_no_setting(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('model = "pocket"\nguarded = false\n')
    fails_with(run("serve", "--config", path), "guarded: Extra inputs are not permitted")
    path.write_text("model = ")
    fails_with(run("serve", "--config", path), "cannot be read")


def test_a_guard_is_fitted_once_and_kept_for_these_weights(
    processor: LlavaProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guard: Guard,
) -> None:
    monkeypatch.setenv("VLM_SAFEGUARD_CACHE", str(tmp_path / "cache"))
    fits: list[LlavaForConditionalGeneration] = []

    def fit(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Guard:
        fits.append(model)
        return guard

    monkeypatch.setattr(Guard, "fit", fit)
    model, other = make_model(processor), make_model(processor, seed=5)
    first = kept_guard("folder/tiny", model, processor)
    again = kept_guard("folder/tiny", model, processor)
    assert first.policy.sha256() == again.policy.sha256()
    assert fits == [model]
    kept_guard("folder/tiny", other, processor)
    assert fits == [model, other], "a guard of other weights is not taken"
    monkeypatch.setattr(response, "DEFAULT_RESPONSE", Response.EDIT)
    kept_guard("folder/tiny", model, processor)
    assert fits == [model, other, model], "a guard of other defaults is not taken"


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, processor: LlavaProcessor, guard: Guard
) -> Path:
    """A model's folder, with its guard in a folder within."""
    folder = tmp_path_factory.mktemp("tiny-llava")
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    guard.variant(response=Response.EDIT).save_pretrained(folder / "guard")
    return folder


def start(*options: object, err: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlm_safeguard.cli", "serve", *map(str, options)],
        stderr=err,
        text=True,
        env=os.environ | {KEY_VARIABLE: "of-the-environment"},
    )


def test_the_process_answers_and_ends_at_sigterm(checkpoint: Path) -> None:
    process = start(checkpoint, "--guard", checkpoint / "guard", "--port", 0, "--response", "text")
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"(http://\S+) as '(\S+)'", line)
        assert found, line
        address, name = found.groups()
        assert name == checkpoint.name, "no path is told"
        await_ready(address, process)
        client = openai_client(address, "of-the-environment")
        answer = client.chat.completions.create(
            model=name, messages=said("How to swim"), max_tokens=3
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_a_process_that_is_killed_leaves_an_error_and_no_token_more(
    checkpoint: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """While there is no room for its logs; the pieces before it are the guarded answer's."""
    question = QUESTIONS[0]
    guard = Guard.from_pretrained(checkpoint / "guard")
    inputs = ask(processor, [question])
    with guard.attach(model):
        ids = model.generate(**inputs, max_new_tokens=300, do_sample=False)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with Path("/dev/full").open("w") as full:
        process = start(checkpoint, "--guard", checkpoint / "guard", "--port", port, err=full)
    try:
        await_ready(address, process)
        stream = openai_client(address, "of-the-environment").chat.completions.create(
            model=checkpoint.name,
            messages=said(question, noise_image(len(question))),
            temperature=0,
            max_tokens=300,
            stream=True,
        )
        pieces: list[str] = []

        def read() -> None:
            for chunk in stream:
                pieces.append(chunk.choices[0].delta.content or "")
                if len(pieces) == 5:
                    process.kill()

        with pytest.raises((openai.APIError, httpx.HTTPError)):
            read()
        assert 5 <= len(pieces) < 290
        assert expected.startswith("".join(pieces))
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()


def await_ready(address: str, process: subprocess.Popen[str]) -> None:
    """Asked seldom and by one client, which takes the process no time while it starts."""

    def is_ready() -> bool:
        assert process.poll() is None
        with suppress(httpx.TransportError):
            return client.get("/ready").status_code == 200
        return False

    with httpx.Client(base_url=address, trust_env=False) as client:
        until(is_ready, 120, pause=0.1)


def test_the_process_ends_with_an_error_where_the_guard_is_not_for_the_model(
    checkpoint: Path,
    tmp_path: Path,
    processor: LlavaProcessor,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole command, in this process."""
    make_model(processor, seed=5).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    keep_logs_apart(monkeypatch)
    ended = run("serve", tmp_path, "--guard", checkpoint / "guard", "--port", 0)
    fails_with(ended, "same shape but other weights")
