"""The recipes for containers: linted, and in step with the server that they start."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_safeguard.serving import app
from vlm_safeguard.serving.settings import KEY_VARIABLE, ServeSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return read


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no build for this machine")
def test_the_dockerfile_is_linted() -> None:
    assert HADOLINT is not None
    linted = subprocess.run(
        [HADOLINT, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout


def test_the_image_has_what_it_copies_and_nothing_else() -> None:
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    assert {"src", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == kept
    assert all((ROOT / name).exists() for name in kept)


def test_containers_run_as_nobody_and_are_looked_after() -> None:
    recipe = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    last_user = [line for line in recipe if line.startswith("USER ")][-1]
    assert last_user == "USER 10001:10001"
    check = next(line for line in recipe if "urlopen" in line)
    path = check.partition("127.0.0.1:8000")[2].partition("'")[0]
    assert path in routes()
    assert "8000" in next(line for line in recipe if line.startswith("EXPOSE"))
    assert ServeSettings.model_fields["port"].default == 8000


def routes() -> set[str]:
    source = Path(app.__file__).read_text("utf-8")
    return {word for word in source.replace('"', " ").split() if word.startswith("/")}


def test_the_options_that_are_given_are_the_servers_own() -> None:
    guard = compose()["services"]["guard"]
    names = {word[2:].replace("-", "_") for word in guard["command"] if word.startswith("--")}
    assert names
    assert names <= set(ServeSettings.model_fields)
    assert KEY_VARIABLE in guard["environment"]
    grace = int(guard["stop_grace_period"].removesuffix("s"))
    assert grace > ServeSettings.model_fields["drain"].default


def test_files_and_volumes_that_services_name_exist() -> None:
    recipe = compose()
    for service in recipe["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_file()
            else:
                assert source in recipe["volumes"]
    assert (DEPLOY / recipe["services"]["guard"]["build"]["context"]).resolve() == ROOT


def test_who_watches_and_who_asks_find_the_guard() -> None:
    port = compose()["services"]["guard"]["ports"][0].rpartition(":")[2]
    watched = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    (job,) = watched["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"guard:{port}"]
    assert job["metrics_path"] in routes()
    gateway = yaml.safe_load((DEPLOY / "litellm.yaml").read_text("utf-8"))
    (rail,) = gateway["guardrails"]
    asked = rail["litellm_params"]
    assert asked["api_base"] == f"http://guard:{port}"
    assert asked["mode"] == "pre_call"
    assert asked["default_on"]
    assert asked["unreachable_fallback"] == "fail_closed"
    named = {
        value.removeprefix("os.environ/")
        for each in gateway["model_list"]
        for value in each["litellm_params"].values()
    }
    assert len(gateway["model_list"]) == 2
    assert named <= set(compose()["services"]["gateway"]["environment"])
