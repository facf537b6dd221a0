"""Data flows one way: no module imports a higher one, the core imports little, `--help` less."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vlm_safeguard

ROOT = Path(vlm_safeguard.__file__).parent
#: Rooms and files of the package, lower ones first.
ORDER = (
    *("errors", "extras", "images", "progress", "anchors", "forms"),
    *("policy", "model", "engines", "fit", "guard"),
    *("timing", "doctor", "pocket", "loading", "defences", "evaluation", "report", "serving"),
    *("playground", "cli"),
)
CORE = ORDER[: ORDER.index("guard") + 1]
ALLOWED = {
    *("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "tqdm", "PIL"),
    "jinja2",
}
HEAVY = ("torch", "transformers", "matplotlib")
FILES = sorted(ROOT.rglob("*.py"))
CORE_FILES = [f for f in FILES if f.relative_to(ROOT).parts[0].removesuffix(".py") in CORE]


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, in functions and for types only, too.

    `from a import b` gives a.b, as b may be a module. `package` is what a relative import is
    relative to.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer_of(name: str) -> str | None:
    """The layer that a dotted name of this package belongs to; None for the package itself."""
    parts = name.split(".")
    assert parts[0] == "vlm_safeguard"
    head = parts[1] if len(parts) > 1 else ""
    head = vlm_safeguard._HOME.get(head, head)
    return None if head in ("", "__version__") else head


def imported_by(path: Path) -> list[tuple[int, str]]:
    inside = path.relative_to(ROOT.parent)
    package = ".".join(inside.parent.parts)
    return list(imports(path.read_text("utf-8"), package))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_module_imports_a_higher_one(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the package's own door, which gives what others define
    limit = ORDER.index(own)  # a new module has to be given a place
    for line, name in imported_by(path):
        if name.split(".")[0] == "vlm_safeguard" and (layer := layer_of(name)) is not None:
            assert layer in ORDER, f"{named(path)}:{line} imports {name}"
            assert ORDER.index(layer) <= limit, f"{named(path)}:{line} imports {name}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types only and in functions count, too; the package's own door does not."""
    known = {module_of(path): path for path in FILES if path != ROOT / "__init__.py"}
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        names = {name for _, name in imported_by(path)}
        modules = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[module] = modules & known.keys() - {module}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", CORE_FILES, ids=named)
def test_the_core_imports_little(path: Path) -> None:
    known = ALLOWED | {"uvloop", "vllm"} if "vllm" in path.parts else ALLOWED
    foreign = {
        top
        for _, module in imported_by(path)
        if (top := module.split(".")[0]) not in sys.stdlib_module_names
    }
    assert foreign <= known | {"vlm_safeguard"}


def test_no_test_module_imports_another() -> None:
    for path in Path(__file__).parent.rglob("*.py"):
        for line, name in imports(path.read_text("utf-8"), ""):
            top = name.split(".")[0]
            assert top != "conftest", f"{path.name}:{line}: makers stand in support/ and tiny/"
            assert not top.startswith("test_"), f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", CORE_FILES, ids=named)
def test_the_cores_files_and_classes_are_of_one_idea(path: Path) -> None:
    source = path.read_text("utf-8")
    assert len(source.splitlines()) < 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 250, node.name


def test_the_check_sees_what_it_should() -> None:
    source = (
        "import a.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import no\n"
        "else:\n    import c\ndef f():\n    from d import e\nfrom . import g\nfrom ..h import i\n"
    )
    found = {name for _, name in imports(source, "p.q")}
    assert found == {"a.b", "typing.TYPE_CHECKING", "no", "c", "d.e", "p.q.g", "p.h.i"}
    assert layer_of("vlm_safeguard.Guard") == "guard"
    assert layer_of("vlm_safeguard.pocket.scenes.Scene") == "pocket"
    assert layer_of("vlm_safeguard.__version__") is None


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )


@pytest.mark.parametrize("module", ["vlm_safeguard", "vlm_safeguard.cli"])
def test_importing_is_light(module: str) -> None:
    done = python("-c", f"import sys, {module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert module.split(".")[0] in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("command", [(), ("eval",)])
def test_help_is_light(command: tuple[str, ...]) -> None:
    done = python("-X", "importtime", "-m", "vlm_safeguard.cli", *command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    loaded = {line.rpartition("|")[2].split(".")[0].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_the_package_gives_what_it_promises() -> None:
    for name in vlm_safeguard.__all__:
        assert getattr(vlm_safeguard, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlm_safeguard.nothing
