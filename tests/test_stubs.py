"""What we tell mypy of transformers is true of the installed release."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

STUBS = Path(__file__).parents[1] / "stubs"
OWNERS = {"self", "cls"}
FILES = sorted(STUBS.rglob("*.pyi"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(STUBS).with_suffix("").parts).removesuffix(".__init__")


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """(module, class) of every class in the stubs."""
    for path in FILES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                yield module_of(path), node


CLASSES = [pytest.param(module, node, id=node.name) for module, node in classes()]


@pytest.mark.parametrize(("module", "stub"), CLASSES)
def test_its_bases_and_methods_are_there(module: str, stub: ast.ClassDef) -> None:
    real = getattr(importlib.import_module(module), stub.name)
    if real is PreTrainedModel:
        real = LlavaForConditionalGeneration  # our models all generate
    ancestors = {kind.__name__ for kind in inspect.getmro(real)}
    for base in stub.bases:
        name = ast.unparse(base).split("[")[0].split(".")[-1]
        assert name in ancestors
    for method in stub.body:
        if isinstance(method, ast.FunctionDef) and method.name not in (
            "__init__",
            "__getattr__",
            "__setattr__",
        ):
            check_method(inspect.getattr_static(real, method.name), method)


def check_method(real: object, stub: ast.FunctionDef) -> None:
    """Of the same kind, and with the same named parameters in the same places."""
    kinds = {ast.unparse(decorator) for decorator in stub.decorator_list}
    assert isinstance(real, property) == ("property" in kinds)
    assert isinstance(real, classmethod) == ("classmethod" in kinds)
    if isinstance(real, property):
        return
    function = real.__func__ if isinstance(real, classmethod) else real
    assert callable(function)
    known = list(inspect.signature(function).parameters.values())
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in known):
        names = [parameter.name for parameter in known if parameter.name not in OWNERS]
        positional = [argument.arg for argument in stub.args.args if argument.arg not in OWNERS]
        assert names[: len(positional)] == positional
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known)
    assert free or {argument.arg for argument in stub.args.kwonlyargs} <= {p.name for p in known}
    assert free or stub.args.kwarg is None


def fields(name: str) -> set[str]:
    """The attributes that the stubs give a class, its bases' among them."""
    (stub,) = (node for _, node in classes() if node.name == name)
    own = {
        node.target.id
        for node in stub.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    known = {node.name for _, node in classes()}
    return own.union(*(fields(base) for b in stub.bases if (base := ast.unparse(b)) in known))


def test_its_attributes_are_there(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    for one in (model, model.config, processor, processor.tokenizer):
        for name in fields(
            type(one).__name__.replace("TokenizersBackend", "PreTrainedTokenizerFast")
        ):
            assert hasattr(one, name), f"{type(one).__name__} has no {name}"
