"""Our pages: what they point to is there, and what they take from data is what the data give."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_safeguard import Guard, pocket
from vlm_safeguard.images import noise_image

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("results/*/*.md"),
        *ROOT.glob("src/vlm_safeguard/pocket/*.md"),
    ]
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """`docs/make.py`, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")  # where the page on vLLM has its tables
        spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> Iterator[str]:
    """What a link may name of a page: its headings, as GitHub writes them."""
    for heading in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text("utf-8")):
        if "://" not in target:
            path = page.parent / target if target else page
            assert path.exists(), target
            assert not heading or heading in anchors(path), f"{target}#{heading}"


@each_page
def test_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", page.read_text("utf-8")):
        source = (ROOT / file).read_text("utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file}::{name}"


def test_every_promise_names_its_test() -> None:
    page = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
    promises = page[page.index("## Promises") : page.index("## What is not promised")]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 15
    assert [row for row in rows if "::" not in row and not row.startswith("| promise")] == []


def test_the_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    assert len(re.findall(r"^!\[", readme, re.MULTILINE)) == 1
    tables = re.findall(r"^\|[-|]+\|\n((?:\|.+\n)+)", readme, re.MULTILINE)
    assert [len(table.splitlines()) for table in tables] == [10]


def test_pages_are_what_their_data_give(make: ModuleType) -> None:
    used = set()
    for page in make.pages():
        text = page.read_text("utf-8")
        marks = re.findall(r"<!-- (?:make docs: (\S+)|(end)) -->", text)
        assert [end for _, end in marks] == ["", "end"] * (len(marks) // 2), page.name
        used |= {name for name, _ in marks if name}
        assert text == make.made(text), f"{page.name} is not what its data give: run `make docs`"
    assert used == set(make.PARTS)


def test_what_is_made_of_a_run_is_of_the_run_that_is_shown(make: ModuleType) -> None:
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    runs = {
        "pocket": make.POCKET,
        "coder-default": make.DEFAULTS,
        "coder-responses": make.RESPONSES,
        "coder": make.CODER,
    }
    for name, folder in runs.items():
        behind = page.partition(f"<!-- make docs: {name} -->")[2]
        shown = re.search(r"^### What to make of the run of (\S+)$", behind, re.MULTILINE)
        assert shown is not None
        started = make.evaluation(folder).results.provenance.started
        assert started[:10] == shown[1], "read the section again, mend it, and date it"


def test_the_readme_s_lines_run(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    noise_image(0).save("photo.jpg")
    monkeypatch.setattr(pocket, "load", lambda: (model, processor))
    monkeypatch.setattr(Guard, "fit", lambda *of: guard)  # fitted as the tests' model allows
    names: dict[str, Any] = {}
    exec(code[1], names)
    (receipt,) = guard.receipts
    assert receipt.images == 1
    assert names["answer"][0]["generated_text"][-1]["role"] == "assistant"
    assert Guard.from_pretrained("my-guard").policy.sha256() == guard.policy.sha256()


def test_a_number_that_changed_is_noticed(make: ModuleType) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    number = re.search(r"no defence \| (\d+)", page)
    assert number is not None
    typed = page[: number.start(1)] + "0" + page[number.end(1) :]
    assert typed != page
    assert make.made(typed) == page
