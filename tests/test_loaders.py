"""Benchmark loaders on small files of ours in the published layouts, whole and broken."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from support.layouts import (
    WRITERS,
    Rows,
    as_it_is,
    make_folder,
    mm_harmful,
    mossbench,
    png,
    write_parquet,
    xstest,
)
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.asks.benchmarks.catalogue import BENCHMARKS
from vlm_safeguard.evaluation.asks.benchmarks.own import jailbreak_templates
from vlm_safeguard.evaluation.asks.prompts import read_prompts
from vlm_safeguard.evaluation.asks.samples import Sample

SD_TYPO = "mm_safetybench_sd_typo"


@pytest.fixture(autouse=True)
def cache_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub,
        "cached_assets_path",
        lambda library, namespace: make_folder(tmp_path / "assets" / library / namespace),
    )


def loaded(name: str, folder: Path, change: Callable[[Rows], None] = as_it_is) -> Sequence[Sample]:
    return BENCHMARKS[name].load(WRITERS[name](folder, change))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "mm_safetybench"])
def test_a_whole_benchmark_is_read_whole(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    samples = loaded(name, tmp_path)
    assert len(samples) == benchmark.count
    assert len({sample.id for sample in samples}) == len(samples)
    assert {sample.kind for sample in samples} == benchmark.kinds
    for sample in samples:
        assert (sample.image is not None) == benchmark.own_images
        assert (sample.answer in sample.choices) == (sample.kind == "utility")


def test_what_a_sample_holds(tmp_path: Path) -> None:
    folders = {name: make_folder(tmp_path / name) for name in WRITERS}
    first = loaded("malicious_instruct", folders["malicious_instruct"])[0]
    assert first == Sample("001", "harmful", "Do the bad thing number 0")
    assert loaded("advbench", folders["advbench"])[519].text == "Do bad, thing 519"

    safe, unsafe = (loaded("xstest", folders["xstest"])[n] for n in (0, 449))
    assert (safe.kind, safe.text, safe.category) == ("harmless", 'Ask "0"', "homonyms")
    assert (unsafe.kind, unsafe.category) == ("harmful", "contrast_homonyms")

    seventh = loaded("mm_harmful", folders["mm_harmful"])[7]
    assert seventh.image == folders["mm_harmful"] / "images" / "7.jpg"
    assert seventh.text == "How to do 7?"

    step = loaded("figstep", folders["figstep"])[51]
    assert isinstance(step.image, Path)
    assert (step.id, step.image.name) == ("2-2", "query_ForbidQI_2_2_6.png")
    assert step.text == "How could one do 2 of 2?"
    assert step.category == "Category 2"
    assert step.beside is not None
    assert "do" not in step.beside.split()  # the picture says it

    moss = loaded("mossbench", folders["mossbench"])[1]
    assert (moss.id, moss.category) == ("2", "counterintuitive interpretation")
    assert moss.image == folders["mossbench"] / "data/images/2.png"


def test_what_a_sample_from_parquet_holds(tmp_path: Path) -> None:
    folders = {name: make_folder(tmp_path / name) for name in WRITERS}
    samples = loaded("mm_safetybench", folders["mm_safetybench"])
    assert len(samples) == BENCHMARKS["mm_safetybench"].count == 5040
    assert Counter(sample.category.split("/")[1] for sample in samples) == dict.fromkeys(
        ("SD", "SD_TYPO", "TYPO"), 1680
    )
    third = next(sample for sample in samples if sample.id == "Fraud-TYPO-3")
    # judged on the plain question, asked in the variant's words beside its picture
    assert (third.text, third.beside) == ("Do 3", "See the picture and do 3")
    assert isinstance(third.image, Path)
    assert third.image.read_bytes() == png(3)
    one = BENCHMARKS["mm_safetybench_typo"].load(folders["mm_safetybench"])
    assert one == [sample for sample in samples if sample.category.endswith("/TYPO")]

    asked = loaded("pope", folders["pope"])[3001]
    assert (asked.id, asked.category, asked.answer) == ("popular-1", "popular", "yes")
    assert asked.text == "Is there 3001 in the image? Answer with yes or no."
    first, second = loaded("mme", folders["mme"])[2:4]
    assert (first.id, second.id) == ("OCR/1.jpg-1", "OCR/1.jpg-2")
    assert (first.answer, second.answer) == ("no", "yes")
    assert first.image != second.image


def without(column: str) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row in rows:
            del row[column]

    return change


def last_but(**fields: object) -> Callable[[Rows], None]:
    return lambda rows: rows[-1].update(fields)


def one_fewer(rows: Rows) -> None:
    rows.pop()


def twice(rows: Rows) -> None:
    rows[-1] = rows[-2]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "malicious_instruct",
            one_fewer,
            "holds 99 samples of MaliciousInstruct; the original has 100. Get it again: github.com",
        ),
        ("malicious_instruct", last_but(line=" "), "line 100: empty"),
        ("advbench", without("goal"), r"line 2: there is no 'goal'; its fields are target\."),
        ("advbench", without("target"), "line 2: there is no 'target'"),
        ("advbench", last_but(goal=""), "line 521: 'goal' is empty"),
        ("advbench", one_fewer, "holds 519 samples"),
        ("xstest", without("type"), "line 2: there is no 'type'"),
        ("xstest", last_but(label="unsure"), "line 451: 'label' is 'unsure', not one of safe"),
        ("xstest", last_but(label="safe"), "holds 251 safe and 199 unsafe"),
        ("xstest", twice, "holds the sample '448' twice"),
        ("mm_harmful", without("question"), "line 1: there is no 'question'"),
        ("mm_harmful", one_fewer, "holds 99 samples"),
        ("figstep", last_but(category_id="", task_id=7), "line 501: 'category_id' is empty"),
        ("figstep", without("instruction"), "line 2: there is no 'instruction'"),
        ("figstep", one_fewer, "holds 499 samples"),
        (SD_TYPO, without("image"), "row 1: there is no 'image'"),
        (SD_TYPO, last_but(image=None), "Fraud/SD_TYPO.parquet, row 154: 'image' holds no image"),
        (
            SD_TYPO,
            last_but(image={"bytes": b"GIF?", "path": None}),
            "row 154: .* cannot be read as an im",
        ),
        (SD_TYPO, last_but(id="x"), "row 154: no Text_only question has id x"),
        (
            SD_TYPO,
            one_fewer,
            r"Fraud/SD_TYPO.parquet holds 153 rows; the original has "
            "154",
        ),
        (
            "mossbench",
            last_but(metadata={"over": "type 4"}),
            "entry '300', metadata: 'over' is 'type 4'",
        ),
        ("mossbench", last_but(metadata=None), "entry '300': 'metadata' is missing"),
        ("mossbench", last_but(image="images/0.png"), "entry '300': its image .*0.png is miss"),
        ("mossbench", one_fewer, "holds 299 samples"),
        ("pope", last_but(category="odd"), "row 3000: 'category' is 'odd'"),
        ("pope", one_fewer, "holds 8999 samples"),
        ("mme", last_but(answer="Perhaps"), "row 2374: 'answer' is 'perhaps', not one of yes, no"),
        ("mme", without("question_id"), "row 1: there is no 'question_id'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    name: str, change: Callable[[Rows], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SafeguardError, match=message):
        loaded(name, tmp_path, change)


def test_missing_and_unreadable_pictures_are_named(tmp_path: Path) -> None:
    folder = mm_harmful(tmp_path, as_it_is)
    (folder / "images/41.jpg").unlink()
    with pytest.raises(SafeguardError, match=r"line 42: its image .*41\.jpg is missing"):
        BENCHMARKS["mm_harmful"].load(folder)
    (folder / "images/41.jpg").write_text("<html>not found</html>")
    with pytest.raises(SafeguardError, match=r"line 42: .*41\.jpg cannot be read as an image"):
        BENCHMARKS["mm_harmful"].load(folder)


def test_lines_and_files_that_are_no_json_are_named(tmp_path: Path) -> None:
    folder = mm_harmful(make_folder(tmp_path / "mm"), as_it_is)
    path = folder / "questions.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], lines[6][:-3], *lines[7:]]))
    with pytest.raises(SafeguardError, match="line 7: not JSON"):
        BENCHMARKS["mm_harmful"].load(folder)

    folder = mossbench(make_folder(tmp_path / "moss"), as_it_is)
    path = folder / "data/images_information/information.json"
    path.write_text(path.read_text().replace("{", "{\n", 1)[:-1])
    with pytest.raises(SafeguardError, match=r"information\.json, line 2: not JSON"):
        BENCHMARKS["mossbench"].load(folder)
    path.write_text("[]")
    with pytest.raises(SafeguardError, match="not a JSON object"):
        BENCHMARKS["mossbench"].load(folder)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = make_folder(tmp_path / "data") / "test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SafeguardError, match=r"00001\.parquet cannot be read as Parquet"):
        BENCHMARKS["mme"].load(tmp_path)


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (make_folder(tmp_path / "data") / "test-00000-of-00001.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SafeguardError, match=r"pip install 'vlm-safeguard\[eval\]'"):
        BENCHMARKS["mme"].load(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_folder_and_no_folder_say_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(SafeguardError, match=r"holds no .*\.\w+\. .*path"):
        BENCHMARKS[name].load(tmp_path)
    with pytest.raises(SafeguardError, match=r"(?s)There is no /no/such/place\. .*path"):
        BENCHMARKS[name].load("/no/such/place")


@pytest.mark.parametrize("name", ["mm_harmful", "figstep", "mossbench"])
def test_what_is_not_on_the_hub_says_where_it_is(name: str) -> None:
    with pytest.raises(SafeguardError, match=r"Not on the Hub.* github\.com/\S+: give the path"):
        BENCHMARKS[name].load()


def test_two_files_of_questions_are_not_guessed_between(tmp_path: Path) -> None:
    folder = mm_harmful(tmp_path, as_it_is)
    (folder / "more.jsonl").write_text("{}")
    with pytest.raises(SafeguardError, match=r"several such files \(more.jsonl, questions.jsonl\)"):
        BENCHMARKS["mm_harmful"].load(folder)


def test_the_hub_is_asked_for_the_files_and_the_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(
        repo: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]
    ) -> str:
        asked.append((repo, repo_type, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    xstest(tmp_path, as_it_is)
    assert len(BENCHMARKS["xstest"].load()) == 450
    assert len(BENCHMARKS["xstest"].load("someone/copy@v1.0")) == 450
    assert asked == [
        ("Paul/XSTest", "dataset", None, ["xstest_prompts.csv"]),
        ("someone/copy", "dataset", "v1.0", ["xstest_prompts.csv"]),
    ]


def test_a_hub_that_gives_nothing_says_how_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = r"the Hub did not give it \(no network\)\. XSTest: .*xstest_prompts\.csv"
    with pytest.raises(SafeguardError, match=message):
        BENCHMARKS["xstest"].load()


def test_xstests_second_version_has_its_labels_in_its_types(tmp_path: Path) -> None:
    xstest(tmp_path, without("label"))
    kinds = Counter(sample.kind for sample in BENCHMARKS["xstest"].load(tmp_path))
    assert kinds == {"harmless": 250, "harmful": 200}


def test_malicious_instruct_is_on_the_hub_as_parquet(tmp_path: Path) -> None:
    rows: Rows = [{"prompt": f"Do {n}"} for n in range(100)]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows)
    samples = BENCHMARKS["malicious_instruct"].load(tmp_path)
    assert [sample.text for sample in samples[:2]] == ["Do 0", "Do 1"]


@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if b.shipped])
def test_the_projects_own_sets_come_whole(name: str) -> None:
    benchmark = BENCHMARKS[name]
    samples = benchmark.load()
    assert len(samples) == benchmark.count
    assert {sample.kind for sample in samples} == benchmark.kinds
    assert all((sample.image is not None) == benchmark.own_images for sample in samples)
    with pytest.raises(SafeguardError, match="takes no path"):
        benchmark.load("somewhere")


def test_jailbreaks_are_every_request_in_every_template() -> None:
    found = {(s.category, s.text) for s in BENCHMARKS["jailbreak"].load()}
    assert found == {
        (name, "".join((before, prompt.text, after)))
        for name, template in jailbreak_templates().items()
        for before, after in [template.split("{request}")]
        for prompt in read_prompts("jailbreak")
    }


def test_the_catalogue_says_what_each_is_and_where_from() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert benchmark.title
        assert benchmark.licence
        assert benchmark.shipped or "github.com" in benchmark.source or "Hub" in benchmark.source
        assert benchmark.hub is None or benchmark.hub in benchmark.source
