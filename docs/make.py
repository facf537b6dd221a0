"""What our pages take from data: `make docs` writes it between their markers.

    <!-- make docs: NAME -->
    … the lines that `PARTS[NAME]` gives …
    <!-- end -->

The rest of a page is written by hand. `tests/test_docs.py` fails where a part is not what its data
give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import vllm_results
import vllm_scale
from grid import grid
from vlm_safeguard.cli.model_options import flag
from vlm_safeguard.evaluation.results.folder import Evaluation, read_evaluation
from vlm_safeguard.evaluation.results.measures import (
    Cells,
    accuracy_rows,
    attack_rows,
    over_refusal_rows,
)
from vlm_safeguard.evaluation.results.rows import DEFAULT, Row
from vlm_safeguard.model.families import FAMILIES, REFUSED
from vlm_safeguard.policy.media import KINDS
from vlm_safeguard.report.contents import contents
from vlm_safeguard.report.markdown import plain, table
from vlm_safeguard.report.names import percent
from vlm_safeguard.report.sheets.facts import glossary_sheet
from vlm_safeguard.serving.settings import ServeSettings

Part = Callable[[], Iterable[str]]

ROOT = Path(__file__).parents[1]
DEMO, POCKET, CODER = ROOT / "docs", ROOT / "results" / "pocket", ROOT / "results" / "coder"
DEFAULTS = ROOT / "results" / "coder-default"
RESPONSES = ROOT / "results" / "coder-responses"
BENCHMARKS = ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"(?<=<!-- make docs: )(\S+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """The README and all pages of this folder."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def made(page: str) -> str:
    """A page with its marked parts made anew."""
    return _MARKED.sub(
        lambda at: f"{at[1]}{at[2]}" + "".join(f"{s}\n" for s in PARTS[at[1]]()), page
    )


# From evaluations

#: The README's columns: title, measure, benchmark and image condition.
_COLUMNS: tuple[tuple[str, Callable[[Sequence[Row]], list[Row]], str, str], ...] = (
    ("harmful followed: text only", attack_rows, "harmful", "text"),
    ("harmful followed: + blank", attack_rows, "harmful", "blank"),
    ("harmful followed: + rendered", attack_rows, "harmful", "image"),
    ("jailbreaks followed: + blank", attack_rows, "jailbreak", "blank"),
    ("harmless refused: text only", over_refusal_rows, "harmless", "text"),
    ("harmless refused: + blank", over_refusal_rows, "harmless", "blank"),
    ("image questions right", accuracy_rows, "scenes", "own"),
)
#: Its lines for each VLM: a choice of those that were run on all of these.
_DEFENCES = {
    "none": "no defence",
    DEFAULT: "**default guard**",
    "self-reminder": "Self-Reminder",
    "goal-priority": "Goal Priority",
    "cmrm": "CMRM",
}


@cache
def evaluation(folder: Path) -> Evaluation:
    """A folder's results. Files that git leaves out, such as all answers, are not missed."""
    return replace(read_evaluation(folder), missing=())


def overview() -> Iterator[str]:
    """Both reference VLMs in at most ten lines, each from its latest run of all columns."""
    lines, counts = [], set()
    folders_of = {"Coder": (DEFAULTS, CODER), "Pocket": (POCKET,)}
    for model, folders in folders_of.items():
        runs = [evaluation(folder).results.rows for folder in folders]
        for defence, name in _DEFENCES.items():
            cells = next(filter(None, (_cells(rows, defence) for rows in runs)))
            counts |= {row.n for row in cells}
            lines.append((f"{model}: {name}", *(_share(row) for row in cells)))
    yield from grid(["", *(title for title, *_ in _COLUMNS)], lines)
    n = ", ".join(map(str, sorted(counts)))
    yield f"\nPer cent, with 95 % Wilson intervals; n = {n} a cell."


def _cells(rows: Sequence[Row], defence: str) -> list[Row]:
    """A defence's row in each column; nothing where the run lacks one."""
    cells = [
        Cells(measure(rows)).by_defence.get((benchmark, condition), {}).get(defence)
        for _, measure, benchmark, condition in _COLUMNS
    ]
    there = [cell for cell in cells if cell is not None]
    return there if len(there) == len(cells) else []


def _share(row: Row) -> str:
    return f"{percent(row.value)} ({100 * row.low:.0f}–{100 * row.high:.0f})"


def results(folder: Path, *sections: str) -> Iterator[str]:
    """How a folder was made, what it says in sentences, and the tables of these sections.

    Tables that the report folds are left to the report, unless a section has no others.
    """
    report = contents(evaluation(folder))
    yield from _run(report.evaluation)
    yield "In brackets: 95 % interval and number of requests.\n"
    yield from (
        f"- {plain(words)}" for words in (*report.summary.sentences, *report.summary.cautions)
    )
    for section in report.sections:
        if section.name in sections:
            yield f"\n### {section.title}\n\n{section.intro}"
            open_ones = [sheet for sheet in section.tables if not sheet.folded]
            for sheet in open_ones or section.tables:
                yield f"\n**{plain(sheet.title)}.** {plain(sheet.caption)}\n"
                yield from table(sheet)


def _run(evaluation: Evaluation) -> Iterator[str]:
    """The command, and when, where and with what it ran; or how long the demo took."""
    run, other = evaluation.results.provenance, evaluation.results.other
    if run.command:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        yield f"```console\n$ {run.command}\n```\n"
        device = run.machine["device"]
        yield f"Run of {run.started}, seed {run.seed}; device: {device}; {versions}.\n"
    if "fit_seconds" in other:
        seconds, fit = other["seconds"], other["fit_seconds"]
        yield f"It took {seconds} seconds, {fit} of them to fit the guard.\n"


def defences() -> Iterator[str]:
    """What the names of the tables stand for."""
    rows = [
        row
        for folder in (POCKET, CODER, RESPONSES, DEMO)
        for row in evaluation(folder).results.rows
    ]
    yield from table(glossary_sheet(rows))


# From benchmarks

_NAMES = {
    "default": "**guarded**",
    "guard": "**guard**",
    "hold": "guarded, `Span.ANSWER`",
    "answer": "guarded, `Span.ANSWER`",
    "edit": "guarded, `Response.EDIT`",
    "texts whole": "guarded, texts judged whole",
    "unguarded again": "unguarded again (noise)",
    "none again": "none again (noise)",
}


def timings(name: str, command: str, line: Sequence[int], column: Sequence[int]) -> Iterator[str]:
    """Ratios of times in a grid.

    Args:
        line: which parts of a cell's name, which commas divide, name its line; the others
            (`column`) its column.
    """
    document = _document(name)
    yield from _measured(document, command)
    shown: dict[tuple[str, ...], dict[str, str]] = {}  # line → column → cell
    for cell in document["cells"]:
        parts = cell["name"].split(", ")
        *quantity, compared = (parts[place] for place in line)
        over = ", ".join(parts[place] for place in column)
        low, high = cell["middle"]
        ratio = f"{cell['value']:.2f} ({low:.2f}–{high:.2f})"
        shown.setdefault((*quantity, "1.00 is"), {})[over] = cell["note"]
        shown.setdefault((*quantity, compared), {})[over] = ratio
        if cell["target"] is not None:
            shown.setdefault((*quantity, "target"), {})[over] = f"≤ {cell['target']:.2f}"
    columns = list(dict.fromkeys(over for cells in shown.values() for over in cells))
    yield from grid(
        ["", *columns],
        [
            (
                ", ".join(_NAMES.get(name, name) for name in names),
                *(cells.get(over, "") for over in columns),
            )
            for names, cells in shown.items()
        ],
    )


def amounts(name: str, command: str) -> Iterator[str]:
    """Amounts, a line each."""
    document = _document(name)
    yield from _measured(document, command)
    yield from grid(
        ["", "measured", "target", "runs", ""],
        [
            (
                cell["name"],
                f"{cell['value']:{'.3g' if cell['value'] < 1000 else ',.0f'}} {cell['unit']}"
                + (f" ({cell['middle'][0]:.3g}–{cell['middle'][1]:.3g})" if cell["middle"] else ""),
                ""
                if cell["target"] is None
                else f"≤ {cell['target']:.3g} {cell['unit']}, {cell['verdict']}",
                str(cell["rounds"]),
                cell["note"],
            )
            for cell in document["cells"]
        ],
    )


def gates(name: str, *chosen: str) -> Iterator[str]:
    """What each gate, or each of those chosen, opens for: kinds of requests down, gates across."""
    document = _document(name)
    machine, rows = document["machine"], document["rows"]
    yield (
        f"`python benchmarks/gates.py {name.removeprefix('gates-')}`, {machine['dtype']}; in "
        "brackets 95 % intervals, and for how many requests the model's own refusal opens it.\n"
    )
    names = chosen or tuple(dict.fromkeys(row["gate"] for row in rows))
    shown: dict[str, dict[str, str]] = {}
    for row in rows:
        kind = f"{row['kind']}, n = {row['opened']['n']}"
        shown.setdefault(kind, {})[row["gate"]] = _opened(row["opened"], f"; {row['own']}")
    yield from grid(
        ["opened", *names],
        [(kind, *(cells[name] for name in names)) for kind, cells in shown.items()],
    )


def criteria(name: str) -> Iterator[str]:
    """What each score of a text opens for, averaged over its layers."""
    document = _document(name)
    yield (
        f"`python benchmarks/criteria.py {name.removeprefix('criteria-')}`, "
        f"{document['machine']['dtype']}; in brackets 95 % intervals.\n"
    )
    averaged = [row for row in document["rows"] if ", layer " not in row["score"]]
    yield from grid(
        ["score", "prompts", "AUROC", "harmful opened", "harmless opened"],
        [
            (
                row["score"],
                f"{row['form']}, n = {row['opened']['n']}",
                f"{row['auroc']:.3f}",
                *(_opened(row[kind]) for kind in ("opened", "harmless")),
            )
            for row in averaged
        ],
    )


def _opened(share: dict[str, float], more: str = "") -> str:
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f}–{high:.1f}{more})"


def _document(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((BENCHMARKS / f"{name}.json").read_text("utf-8"))
    return read


def _measured(document: dict[str, Any], command: str) -> Iterator[str]:
    """The command, and where and with what it ran."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rounds = " or ".join(map(str, sorted({cell["rounds"] for cell in document["cells"]})))
    yield (
        f"`{command}`, {rounds} rounds, {machine['dtype']}, on {machine['gpu'] or machine['cpu']} "
        f"({machine['cores']} CPU cores); {versions}.\n"
    )


# From the code


def families() -> Iterator[str]:
    """Every verified family, and what is done about each kind of media."""
    lines = []
    for name, family in sorted(FAMILIES.items()):
        words = {
            **dict.fromkeys(family.media, "guarded"),
            **dict.fromkeys(family.refused, "refused"),
        }
        lines.append((f"`{name}`", *(words.get(kind, "–") for kind in KINDS)))
    yield f"{len(lines)} model types are verified.\n"
    yield from grid(["model type", *KINDS], lines)


def refused() -> Iterator[str]:
    """Every refused type, and why."""
    yield from grid(
        ["model type", "why"], [(f"`{name}`", why) for name, why in sorted(REFUSED.items())]
    )


def serving() -> Iterator[str]:
    """Every option of the server but its model."""
    yield from grid(
        ("option", "default", "what"),
        (
            (
                f"`{flag(ServeSettings, name)}`",
                "" if field.default in (None, False, ()) else f"`{field.default}`",
                field.description or "",
            )
            for name, field in ServeSettings.model_fields.items()
            if name != "model"
        ),
    )


_SECTIONS = ("attack", "over-refusal", "utility", "frontier", "cost")
PARTS: dict[str, Part] = {
    "overview": overview,
    "demo": partial(results, DEMO, "refusals", "over-refusal", "utility"),
    "pocket": partial(results, POCKET, *_SECTIONS),
    "coder-default": partial(results, DEFAULTS, "attack", "over-refusal", "utility", "cost"),
    "coder-responses": partial(results, RESPONSES, "attack", "over-refusal", "cost"),
    "coder": partial(results, CODER, *_SECTIONS, "judges"),
    "attack-pocket-long": partial(results, ROOT / "results" / "attack-pocket-long", "attacks"),
    "attack-pocket": partial(results, ROOT / "results" / "attack-pocket", "attacks"),
    "attack-coder": partial(results, ROOT / "results" / "attack-coder", "attacks"),
    "gates-pocket": partial(gates, "gates-pocket"),
    "gates-coder": partial(gates, "gates-coder"),
    "criteria-pocket": partial(criteria, "criteria-pocket"),
    "gates-vllm": partial(gates, "gates-pocket", "discriminant", "refusal words"),
    "defences": defences,
    "speed-pocket": partial(
        timings, "speed-pocket", "python benchmarks/speed.py pocket", (0, 3), (2, 1)
    ),
    "speed-llava-7b": partial(
        timings, "speed-llava-7b", "python benchmarks/speed.py llava-7b", (0, 3), (2, 1)
    ),
    "baselines-pocket": partial(
        timings, "baselines-pocket", "python benchmarks/baselines.py pocket", (0,), (1, 2)
    ),
    "cost-pocket": partial(amounts, "cost-pocket", "python benchmarks/cost.py pocket"),
    "serving-pocket": partial(amounts, "serving-pocket", "python benchmarks/serving.py pocket"),
    "families": families,
    "refused": refused,
    "serving": serving,
    "vllm-agreement": partial(vllm_results.agreement, BENCHMARKS, "pocket"),
    "vllm-agreement-coder": partial(vllm_results.agreement, BENCHMARKS, "coder"),
    "vllm-costs": partial(vllm_results.costs, BENCHMARKS),
    "vllm-scale": partial(vllm_scale.sizing, BENCHMARKS),
    "vllm-scale-assumptions": vllm_scale.assumptions,
    "vllm-storm": partial(vllm_results.storm, BENCHMARKS),
}

if __name__ == "__main__":
    for path in pages():
        path.write_text(made(path.read_text("utf-8")), "utf-8")
