"""What is declared: dependencies are locked, and extras bring what their sentences name."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vlm_safeguard
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.extras import MissingExtraError, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def needed(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """The names of what is installed because of `requirement`, itself included."""
    name = canonicalize_name(requirement.name)
    for extra in {"", *requirement.extras}:
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name == "vlm-safeguard":
            children = EXTRAS[extra] if extra else []
        else:
            yield name
            children = metadata.requires(name) or []
        for child in map(Requirement, children):
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                yield from needed(child, seen)


def test_everything_installed_is_locked_at_its_version() -> None:
    direct = [*PROJECT["dependencies"], "vlm-safeguard[dev]"]
    seen: set[tuple[str, str]] = set()
    names = {name for text in direct for name in needed(Requirement(text), seen)}
    # CUDA builds of torch bring packages that they pin themselves.
    names = {name for name in names if not name.startswith(("cuda-", "nvidia-", "triton"))}
    pins = locked()
    assert names - pins.keys() == set(), "run `make lock`"
    installed = {name: Version(metadata.version(name)) for name in names}
    assert {name: version.public for name, version in installed.items()} == {
        name: pins[name].public for name in names
    }


def test_the_lock_holds_names_and_versions_alone() -> None:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    assert "://" not in text
    assert "--" not in text
    assert locked()["torch"].local is None  # one build's name is not another machine's


def test_all_is_every_extra() -> None:
    (everything,) = map(Requirement, EXTRAS["all"])
    assert everything.extras == EXTRAS.keys() - {"all", "dev"}


def calls_of_require() -> Iterator[tuple[str, tuple[str, ...]]]:
    for path in Path(vlm_safeguard.__file__).parent.rglob("*.py"):
        source = path.read_text("utf-8")
        if "vlm_safeguard.extras import" not in source:
            continue  # what it calls so is something else
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
                extra, *modules = map(ast.literal_eval, node.args)
                yield extra, tuple(modules)


def test_a_named_extra_brings_what_is_missing() -> None:
    distributions = metadata.packages_distributions()
    calls = set(calls_of_require())
    assert {extra for extra, _ in calls} == EXTRAS.keys() - {"all", "dev"}
    for extra, modules in calls:
        brings = {canonicalize_name(Requirement(text).name) for text in EXTRAS[extra]}
        for module in modules:
            top, _, _ = module.partition(".")
            assert {canonicalize_name(name) for name in distributions[top]} & brings, module


def test_a_missing_extra_is_one_sentence() -> None:
    require("report", "json")
    with pytest.raises(SafeguardError) as caught:
        require("report", "json", "no_such_module", "nor_this.sub")
    assert str(caught.value) == (
        "This needs no_such_module and nor_this.sub: pip install 'vlm-safeguard[report]'."
    )
    assert isinstance(caught.value, MissingExtraError)
    assert isinstance(caught.value, ImportError)


def test_the_command_without_typer_says_what_to_install() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['typer'] = None\nfrom vlm_safeguard.cli import main\nmain()",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "vlm-safeguard: This needs typer: pip install 'vlm-safeguard[cli]'.\n"
