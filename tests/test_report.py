"""The report: what it says against the rows, and that it is inert and complete."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from support.command import Run
from support.rows import BASE, harmless, row, utility
from support.synthetic import write_evaluation
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges.measure import Accuracy, JudgeRecord
from vlm_safeguard.evaluation.probes.gap import Gap, gap_record
from vlm_safeguard.evaluation.results.folder import Evaluation, read_evaluation
from vlm_safeguard.evaluation.results.gap import GapRecord
from vlm_safeguard.evaluation.results.lines import KeptReceipt, Line
from vlm_safeguard.evaluation.results.measures import attack_rows, chief_judge
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.evaluation.statistics import Estimate
from vlm_safeguard.guard import Guard
from vlm_safeguard.report.contents import contents
from vlm_safeguard.report.names import condition_name
from vlm_safeguard.report.page import write_report
from vlm_safeguard.report.published import PUBLISHED
from vlm_safeguard.report.samples import WITHHELD, packed, published
from vlm_safeguard.report.sheets.judges import refusal_judge_sheet
from vlm_safeguard.report.sheets.published import published_sheet
from vlm_safeguard.report.summary import Summary, summary
from vlm_safeguard.report.tables import results_table

pytestmark = pytest.mark.xdist_group("report")  # they share a report
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- & \u2028 \"'"
DEMO = Path(__file__).parents[1] / "docs" / "results.json"
VOID = {"meta", "source", "img", "input", "br", "hr"}


def poison(lines: list[dict[str, Any]]) -> None:
    """Untrusted text wherever a model or a judge can put it."""
    for line in lines[:3]:
        line["answer"] = line["request"] = line["category"] = NASTY
        line["image"] = "javascript:alert(3)"
        line["verdicts"]["refusal"]["note"] = NASTY


class Page(HTMLParser):
    """Elements with their attributes, and the text inside each."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.open: list[str] = []
        self.feed(path.read_text("utf-8"))
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data for place, data in self.texts if place and place[-1] == tag]

    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text("script")[0])
        return found


def column(data: dict[str, Any], name: str) -> list[Any]:
    found = data["columns"][name]
    return found["is"] if "is" in found else [found["of"][place] for place in found["at"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, guard: Guard) -> Path:
    place = tmp_path_factory.mktemp("evaluation")
    write_evaluation(place, guard, prompts=6, edit=poison)
    write_report(place)
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "report.html")


# --- the page ---


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not page.all("link")
    assert not page.all("iframe")
    addresses = [
        value
        for _, attributes in page.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data") and value
    ]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    style = "".join(page.text("style"))
    assert style
    assert "url(" not in style
    assert "@import" not in style
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    hashed = b64encode(sha256(page.text("script")[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{hashed}'" in policy


def test_answers_stay_text(page: Page) -> None:
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    for _, attributes in page.found:
        assert not any(name.startswith("on") for name in attributes)
    assert len(page.all("img")) == len(page.all("figure"))
    data = page.data()
    for name in ("answer", "request", "category"):
        assert column(data, name)[:3] == [NASTY] * 3
    assert NASTY in column(data, "notes")[0]


def test_untrusted_names_stay_text(tmp_path: Path) -> None:
    def rename(lines: list[dict[str, Any]]) -> None:
        lines[:] = [line for line in lines if line["defence"] in ("none", "default")]
        for line in lines:
            line["benchmark"] = f"{line['benchmark']}{NASTY}"

    write_evaluation(tmp_path, prompts=1, model=NASTY, edit=rename)
    page = Page(write_report(tmp_path))
    assert len(page.all("script")) == 2
    assert not [i for i in page.all("img") if not (i["src"] or "").startswith("data:")]
    assert page.text("h1") == [f"Safety evaluation of {NASTY}"]
    assert not list(tmp_path.glob("*/*/*")), "a name led out of its folder"
    written = (tmp_path / "report.md").read_text("utf-8")
    assert not re.search(r"(?<!\\)<(script|img)", written)


def test_the_page_can_be_read_by_everyone(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert all((image["alt"] or "").strip() for image in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in heading for heading in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(link["href"] or "")[1:] for link in page.all("a")} <= set(ids)
    labelled = [attributes for tag, attributes in page.found if tag in ("select", "input")]
    assert len(labelled) == len(page.all("label"))
    style = "".join(page.text("style"))
    assert "prefers-color-scheme: dark" in style
    assert len(page.all("source")) == len(page.all("img"))
    assert {p["srcset"] for p in page.all("source")}.isdisjoint(i["src"] for i in page.all("img"))


def test_no_line_ends_between_a_number_and_what_it_counts(page: Page) -> None:
    shown = [
        text
        for tag in ("h3", "th", "td", "small", "li", "caption", "span", "figcaption")
        for text in page.text(tag)
    ]
    assert any("95\u00a0%" in text for text in shown)
    assert any("n\u00a0=\u00a06" in text for text in shown)
    assert not [text for text in shown if "n = " in text or "95 %" in text]


def test_every_answer_is_there_with_its_verdicts_and_receipt(folder: Path, page: Page) -> None:
    data = page.data()
    lines = [json.loads(text) for text in (folder / "samples.jsonl").open(encoding="utf-8")]
    assert data["rows"] == data["total"] == len(lines) > 1000
    assert data["cut"] is None
    for name in ("benchmark", "defence", "kind", "sample", "request", "answer", "image"):
        assert column(data, name) == [line[name] for line in lines]
    tags = [value.split("\n") for value in column(data, "tags")]
    for line, tag in zip(lines, tags, strict=True):
        guarded = (line["receipt"] or {}).get("guarded")
        assert ("gate open" in tag) is (guarded is True)
        assert ("gate closed" in tag) is (guarded is False)
        for judge, verdict in line["verdicts"].items():
            assert (f"{judge}: unsafe" in tag) is (verdict["unsafe"] is True)
            assert (f"{judge}: safe" in tag) is (verdict["unsafe"] is False)
            assert (f"{judge}: refused" in tag) is (verdict["refused"] is True)
            silent = verdict["unsafe"] is None and verdict["refused"] is None
            assert (f"{judge}: unreadable" in tag) is silent
    assert any("judges disagree" in tag for tag in tags)
    folded = column(data, "folded")
    assert all(fold for fold, line in zip(folded, lines, strict=True) if line["kind"] == "harmful")
    assert not any(
        fold for fold, line in zip(folded, lines, strict=True) if line["kind"] == "utility"
    )
    scores = column(data, "receipt text_score")
    for score, line in zip(scores, lines, strict=True):
        expected = line["receipt"] and line["receipt"]["findings"][1]["measures"]["text_score"]
        assert score == (expected if expected is None else pytest.approx(expected, rel=1e-3))


def test_a_copy_for_others_holds_refusals_and_harmless_answers_only(folder: Path) -> None:
    lines = read_evaluation(folder).lines
    withheld = 0
    for line, shown in zip(lines, map(published, lines), strict=True):
        words = {v.refused for v in line.verdicts.values() if v.refused is not None}
        harmful = line.kind == "harmful" or any(v.unsafe for v in line.verdicts.values())
        assert (shown.answer == WITHHELD) == (harmful and words != {True})
        assert shown == line.model_copy(update={"answer": shown.answer})
        withheld += shown.answer == WITHHELD
    assert 0 < withheld < len(lines)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser, chromium")
def test_a_browser_shows_it_and_runs_only_its_script(folder: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}",
            "--dump-dom",
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    total = sum(1 for _ in (folder / "samples.jsonl").open(encoding="utf-8"))
    assert f">{total:,} of {total:,} answers.<" in shown
    assert shown.count("<article>") == 20
    assert shown.count("Show the answer (it may be harmful)</summary></details>") == 20
    assert f"page 1 of {math.ceil(total / 20)}" in shown


# --- size ---


def many(count: int) -> list[Line]:
    rng = random.Random(3)
    words = [f"word{number}" for number in range(3000)]
    return [
        Line(
            benchmark="harmful",
            sample=f"s{number // 10}",
            kind="harmful",
            condition="blank",
            defence=f"d{number % 10}",
            request=f"How to do thing {number // 10}?",
            answer=" ".join(rng.choices(words, k=90)),
            receipt=KeptReceipt.model_validate(
                {
                    "guarded": bool(number % 2),
                    "reason": f"it scores {rng.random():.2f}",
                    "text_score": rng.random(),
                    "layers": list(range(8, 28)),
                }
            ),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "size"),
    [(2_000, 1_800_000), pytest.param(20_000, 13_000_000, marks=pytest.mark.thorough)],
)
def test_thousands_of_answers_stay_small(count: int, size: int) -> None:
    lines = many(count)
    text = packed(lines)
    assert len(text) < size
    assert len(text) < 0.75 * sum(len(line.model_dump_json()) for line in lines)
    data = json.loads(text)
    assert data["rows"] == data["total"] == count
    assert column(data, "receipt layers")[7] == "8–27"


def test_what_does_not_fit_is_cut_and_left_out_evenly_and_says_so() -> None:
    lines = many(1000)
    whole = packed(lines)
    shorter = json.loads(packed(lines, len(whole) // 2))
    assert shorter["rows"] == 1000
    assert shorter["cut"] < 600
    assert max(map(len, column(shorter, "answer"))) == shorter["cut"]
    for limit in (len(whole) // 10, len(whole) // 30):
        text = packed(lines, limit)
        assert len(text) <= limit
        few = json.loads(text)
        assert few["rows"] < few["total"] == 1000
        kept = column(few, "sample")
        assert all(kept.count(sample) == 10 for sample in set(kept)), "a request lost a defence"
        assert int(kept[-1][1:]) > 80


# --- tables and files ---


@pytest.mark.parametrize("count", [3, 9])
def test_a_terminal_shows_every_share_whole(count: int) -> None:
    """However many conditions there are beside three defences: the more of them go down."""
    names = [f"condition {n}" for n in range(count)]
    share = {
        (defence, condition): (20 * column + 10 * place) / 200
        for column, defence in enumerate(("none", "default", "refuse"))
        for place, condition in enumerate(names)
    }
    rows = [row("evil", each, defence, value) for (defence, each), value in share.items()]
    terminal = Console(width=80, file=StringIO(), record=True)
    terminal.print(results_table(rows, "Shares"))
    lines = [re.findall(r"[^│]+", line) for line in terminal.export_text().splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines]
    for defence, condition in share:
        if count == 9:
            wanted = [share[each, condition] for each in ("none", "default", "refuse")]
            title = f"harmful, {condition}"
        else:
            wanted, title = [share[defence, each] for each in names], defence
        assert [title, *(f"{100 * value:.0f}" for value in wanted)] in cells


def test_tables_hold_the_rows(folder: Path) -> None:
    evaluation = read_evaluation(folder)
    with (folder / "tables" / "rows.csv").open(encoding="utf-8", newline="") as file:
        read = [
            Row.model_validate({name: value or None for name, value in line.items()})
            for line in csv.DictReader(file)
        ]
    assert read == evaluation.results.rows
    tables = {t.name: t for section in contents(evaluation).sections for t in section.tables}
    for each in evaluation.results.rows:
        name = "_".join(filter(None, (each.metric, each.benchmark, each.judge)))
        line = next(x for x in tables[name].lines if x[0].text == each.defence)
        shown = condition_name(each.condition)
        place = [title.split(" (n =")[0] for title in tables[name].header].index(shown)
        cell = line[place]
        assert cell.number == each.value
        scale = 100 if each.metric in ("refusal", "attack_success", "accuracy", "unreadable") else 1
        assert float(cell.text.rstrip(" %")) == pytest.approx(
            scale * each.value, rel=5e-3, abs=0.05
        )
        low, high = re.findall(r"[\d.]+", cell.small)[:2]
        assert float(low) == pytest.approx(scale * each.low, rel=5e-3, abs=0.05)
        assert float(high) == pytest.approx(scale * each.high, rel=5e-3, abs=0.05)
        assert f"n = {each.n}" in f"{tables[name].header[place]} {cell.small}"


def test_attacks_are_shown_by_defence_with_what_was_transferred(folder: Path) -> None:
    evaluation = read_evaluation(folder)
    report = contents(evaluation)
    (section,) = (each for each in report.sections if each.name == "attacks")
    (table,), (figure,) = section.tables, section.figures
    assert [line[0].text for line in table.lines] == ["none", "restore", "default", "text"]
    by_cell = {
        (line[0].text, head): cell
        for line in table.lines
        for head, cell in zip(table.header[1:], line[1:], strict=True)
    }
    heads = {
        ("none", "text"): "text only",
        ("none", "noise"): "as it is",
        ("prefill", "noise"): "answer begun",
        ("suffix", "noise"): "suffix found",
    }
    for share in evaluation.results.attacks:
        head = heads.get((share.attack, share.condition))
        if head is None:
            name = "PGD" if share.attack == "pgd" else "one image for all"
            head = f"{name}, {'unbounded' if share.epsilon == 255 else f'ε = {share.epsilon}/255'}"
        cell = by_cell.pop((share.defence, head))
        assert cell.number == share.value
        transferred = share.defence == "text" and share.attack in ("pgd", "universal")
        assert ("transferred" in cell.small) is transferred
    assert not by_cell
    assert (folder / "figures" / f"{figure.name}.png").stat().st_size > 1000
    (sentence,) = (each for each in report.summary.sentences if "Under attacks" in each)
    assert "“none” 81\u00a0%" in sentence
    assert "(PGD, unbounded)" in sentence


def test_markdown_holds_every_table_and_figure(folder: Path) -> None:
    text = (folder / "report.md").read_text("utf-8")
    report = contents(read_evaluation(folder))
    for section in report.sections:
        assert f"## {section.title}" in text
        titles = [table.title for table in section.tables]
        assert len(set(titles)) == len(titles), "two tables of a section share a heading"
        assert all(figure.caption in text for figure in section.figures)
        for table in section.tables:
            assert (folder / "tables" / f"{table.name}.csv").is_file()
    figures = re.findall(r"!\[(.+)\]\((.+)\)", text)
    assert len(figures) == sum(len(section.figures) for section in report.sections) >= 9
    for alt, place in figures:
        assert alt
        with Image.open(folder / place) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20
    for block in re.findall(r"(?m)(?:^\|.*\n)+", text):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    for sentence in (*report.summary.sentences, *report.summary.cautions):
        assert sentence.replace("<", r"\<").replace(">", r"\>") in text


def test_the_exact_command_versions_and_seed_are_told(folder: Path, page: Page) -> None:
    made = read_evaluation(folder).results.provenance
    shown = "\n".join(page.text("pre"))
    assert made.command in shown
    cells = page.text("td")
    assert str(made.seed) in cells
    assert made.versions["torch"] in cells


def test_published_figures_only_beside_the_same_model() -> None:
    def rows(model: str) -> Results:
        cells = [
            row(benchmark, condition, defence, 0.25, judge="llama-guard")
            for benchmark in ("malicious_instruct", "jailbreak")
            for condition in ("text", "blank", "noise")
            for defence in ("none", "default")
        ]
        cells += [cell.model_copy(update={"judge": "rubric", "value": 0.5}) for cell in cells]
        return Results(model=model, rows=cells, time_ratio=1)

    assert published_sheet(rows("pocket"), "llama-guard") is None
    assert published_sheet(rows("llava-hf/llava-1.5-13b-hf"), "llama-guard") is None
    sheet = published_sheet(rows("llava-hf/llava-1.5-7b-hf"), "llama-guard")
    assert sheet is not None
    shown = [[cell.text for cell in line] for line in sheet.lines]
    assert ["malicious_instruct", "+ blank image", "none", "34 %", "25 %"] in shown
    assert ["figstep", "+ its own image", "ShiftDC", "13.2 %", "not measured"] in shown
    either = "text only or + blank image"
    assert shown.count(["jailbreak", either, "VLM-Guard", "about 1 %", "25 %"]) == 2
    assert not any("50 %" in line for line in shown)
    assert {figure.model for figure in PUBLISHED} == {"llava-hf/llava-1.5-7b-hf"}


def test_a_demo_s_folder_is_enough_and_what_lacks_is_said(tmp_path: Path) -> None:
    shutil.copy(DEMO, tmp_path / "results.json")
    page = Page(write_report(tmp_path))
    results = Results.model_validate_json(DEMO.read_text("utf-8"))
    assert any("samples.jsonl, guard, gap.json" in text for text in page.text("li"))
    assert not [s for s in page.all("section") if s["id"] == "samples"]
    asked = ("none", "harmful", "refusal")
    none = {r.condition: r for r in results.rows if (r.defence, r.prompts, r.metric) == asked}
    worst = min(none.values(), key=lambda r: r.value)
    gap = next(text for text in page.text("li") if text.startswith("The gap"))
    assert f"{100 * (1 - worst.value):.0f}\u00a0% (" in gap
    assert f"+{100 * (none['text'].value - worst.value):.0f} points" in gap


# --- what is found ---


def summed_up(rows: list[Row], **values: Any) -> Summary:
    results = Results(model="some/model", rows=rows, time_ratio=0, **values)
    return summary(Evaluation(results=results, lines=[], guard=None, gap=None, missing=()))


def test_the_gap_s_sentence_is_computed() -> None:
    found = summed_up([*BASE, row("evil", "blank", "default", 0.12)])
    assert "followed 10\u00a0%" in found.sentences[0]
    assert "50\u00a0% (43.1–56.9, n\u00a0=\u00a0200): +40 points" in found.sentences[0]
    assert "in 1 of 2 cells" in found.sentences[0]
    assert "from 50\u00a0%" in found.sentences[1]
    assert "lower than without a guard in 1 of 3 cells and higher in 0" in found.sentences[1]
    assert [value for value, _ in found.headline] == ["10\u00a0%", "50\u00a0%", "12\u00a0%"]


def test_what_the_guard_costs_elsewhere_is_told_by_its_worst_cell() -> None:
    rows = [
        harmless("text", "none", 0.05),
        harmless("text", "default", 0.06),
        harmless("blank", "none", 0.01),
        harmless("blank", "default", 0.04),
        utility("none", 0.9),
        utility("default", 0.8),
    ]
    worst = summed_up(rows)
    over_refusal, use = worst.sentences[2:4]
    assert "went from 1\u00a0%" in over_refusal
    assert "with a blank image, the largest rise (+3 points) in all 2 cells" in over_refusal
    assert use.startswith("Utility: 90\u00a0%")
    assert "the largest change in the only cell" in use
    assert worst.headline == (("+3 points", "change in harmless requests refused, at worst"),)
    rows[1], rows[3] = harmless("text", "default", 0.05), harmless("blank", "default", 0.0)
    better = summed_up(rows).sentences[2]
    assert "no more harmless requests were refused than without, in all 2 cells" in better
    assert "at most 5\u00a0%" in better


def test_nothing_is_claimed_without_its_rows(tmp_path: Path) -> None:
    found = summed_up([row("evil", "text", "none", 0.1)])
    assert sum("not measured" in sentence for sentence in found.sentences) == 4
    assert found.headline == ()
    attacked = summed_up([], attacks=write_evaluation(tmp_path).attacks).sentences
    assert [sentence.partition(",")[0] for sentence in attacked] == [
        "Under attacks that know the defence"
    ]


def test_every_report_that_quotes_the_refusal_judge_says_how_often_it_is_right() -> None:
    share = Estimate(n=50, value=0.9, low=0.786, high=0.957)
    record = JudgeRecord(
        judge_sha256="ab" * 32,
        openings_sha256="cd" * 32,
        held_out=Accuracy(n=100, precision=share, recall=None),
        by_language={"English": Accuracy(n=60, precision=share, recall=share)},
        by_form={},
    )
    refusals = [row("evil", "blank", "none", 0.7, metric="refusal", judge="refusal")]
    over_refusals = [
        harmless("blank", "none", 0.1),
        row("evil", "text", "none", 0.1, judge="rubric"),
    ]
    demo = [row("evil", "text", "none", 0.1, metric="refusal", judge=None)]
    for rows in (refusals, over_refusals, demo):
        (told,) = (x for x in summed_up(rows, refusal_judge=record).cautions if "precision" in x)
        assert "precision 0.90 (0.79–0.96), recall none on 100 openings" in told
        assert any("do not name" in caution for caution in summed_up(rows).cautions)
    by_rubric = [row("evil", "text", "none", 0.1, judge="rubric")]
    assert not any("counted by" in x for x in summed_up(by_rubric, refusal_judge=record).cautions)

    sheet = refusal_judge_sheet(record)
    assert record.judge_sha256[:12] in sheet.caption
    assert [[cell.text for cell in line] for line in sheet.lines] == [
        ["all", "100", "90 %", ""],
        ["English", "60", "90 %", "90 %"],
    ]


def test_the_judge_of_most_cells_is_quoted_and_phrases_are_owned_up_to() -> None:
    judged = [
        row("evil", "blank", "none", value, judge=judge)
        for judge, value in (("llama-guard", 0.5), ("rubric", 0.4), ("refusal", 0.3))
    ]
    assert chief_judge(judged, "attack_success") == "llama-guard"  # as named first
    assert [r.value for r in attack_rows(judged)] == [0.5]
    assert chief_judge(judged[::-1], "attack_success") == "refusal"
    first = row("odd", "blank", "none", 0.2, judge="refusal")  # a benchmark with one judge alone
    assert chief_judge([first, *judged, judged[0]], "attack_success") == "refusal"
    assert chief_judge([first, *judged, judged[0], judged[0]], "attack_success") == "llama-guard"
    assert chief_judge(judged, "kl") is None
    weak = summed_up(judged[2:])
    assert any("phrases of refusal" in caution for caution in weak.cautions)
    assert not any("phrases" in x for x in summed_up(judged).cautions)
    refusals = [row("evil", "blank", "none", 0.7, metric="refusal", judge="refusal")]
    made = attack_rows(refusals)[0]
    assert (made.value, made.low, made.high) == pytest.approx(
        (0.3, 1 - refusals[0].high, 1 - refusals[0].low)
    )


def test_cautions_name_what_weakens_the_results() -> None:
    rows = [
        row("evil", "text", "none", 0.4, n=50),
        row("evil", "blank", "none", 0.5, n=50),
        row("evil", "blank", "default", 0.3, n=50),
        row("evil", "blank", "random", 0.3, n=50),
        row("evil", "blank", "default", 0.1, metric="unreadable"),
    ]
    pair = {
        "question": "succeeded",
        "judge_a": "x",
        "judge_b": "y",
        "n": 9,
        "left_out": 0,
        "kappa": 0.2,
        "table": [[4, 2], [2, 1]],
    }
    said = " ".join(summed_up(rows, agreement=[pair]).cautions)
    for words in (
        "4 of 5 rows",
        "fewer than 100",
        "could not be read",
        "“x” and “y” agree little on which",
        "itself would do",
        "random on “evil”",
    ):
        assert words in said


# --- the gap ---


def test_gap_points_are_the_text_s_principal_components() -> None:
    torch.manual_seed(0)
    states = [torch.randn(12, 9) + shift for shift in (2.0, -2.0, 1.0, -1.0, 1.5, -1.5)]
    gap = Gap(4, (states[0], states[1]), (states[2], states[3]), (states[4], states[5]))
    record = gap_record(gap, "noise", {"text": [0.5, 0.9]})
    both = torch.cat(gap.text).double()
    values, vectors = torch.linalg.eigh(torch.cov(both.T))
    axes = vectors[:, [-1, -2]]
    for states_of, groups in ((gap.text, record.text), (gap.guarded, record.guarded)):
        expected = (torch.cat(states_of).double() - both.mean(0)) @ axes
        found = torch.tensor(groups.harmful + groups.harmless).double()
        assert torch.allclose(found.abs(), expected.abs(), atol=1e-3)
    harmful, harmless_points = map(torch.tensor, (record.text.harmful, record.text.harmless))
    assert harmful[:, 0].mean() > harmless_points[:, 0].mean()
    both_points = torch.cat((harmful, harmless_points))
    assert both_points.var(0)[0].item() == pytest.approx(values[-1].item(), rel=1e-3)
    assert torch.allclose(both_points.mean(0), torch.zeros(2), atol=1e-3)
    assert GapRecord.model_validate_json(record.model_dump_json()) == record


# --- errors ---


def refused(folder: Path) -> str:
    with pytest.raises(SafeguardError) as caught:
        write_report(folder)
    assert not (folder / "report.html").exists()
    return str(caught.value)


def test_a_folder_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    assert "holds no results.json" in refused(tmp_path)
    (tmp_path / "results.json").write_text('{"model": "x", "rows": []}')
    assert "time_ratio" in refused(tmp_path)
    empty = Results(model="x", rows=[], time_ratio=1)
    (tmp_path / "results.json").write_text(empty.model_dump_json())
    assert "no rows" in refused(tmp_path)
    good = empty.model_copy(update={"rows": BASE})
    broken = json.loads(good.model_dump_json()) | {"comparisons": [{"a": "x"}]}
    (tmp_path / "results.json").write_text(json.dumps(broken))
    assert "comparisons.0" in refused(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(broken | {"format": 3}))
    assert "format 3" in refused(tmp_path)
    (tmp_path / "results.json").write_text(good.model_dump_json())
    (tmp_path / "samples.jsonl").write_text(many(1)[0].model_dump_json() + '\n{"sam')
    assert "line 2" in refused(tmp_path)
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "gap.json").write_text('{"layer": 1}')
    assert "gap.json cannot be read" in refused(tmp_path)
    (tmp_path / "gap.json").unlink()
    (tmp_path / "guard").mkdir()
    assert "is not a guard" in refused(tmp_path)


def test_without_jinja2_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text(
        Results(model="x", rows=BASE, time_ratio=1).model_dump_json()
    )
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "vlm-safeguard[report]" in refused(tmp_path)


def test_the_command(run: Run, tmp_path: Path) -> None:
    failed = run("report", tmp_path)
    assert failed.code == 1
    assert "holds no results.json" in failed.err
    shutil.copy(DEMO, tmp_path / "results.json")
    done = run("report", tmp_path, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"report": str(tmp_path / "report.html")}
    assert (tmp_path / "report.html").stat().st_size > 100_000
