"""The report as Markdown, CSV and PNG files, for papers and pull requests."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.report.contents import Contents
from vlm_safeguard.report.markdown import inline, plain, table
from vlm_safeguard.report.section import Figure


def export(report: Contents, folder: Path) -> None:
    """Write `report.md`, `tables/*.csv` and `figures/*.png` into `folder`.

    `tables/rows.csv` holds the rows as they are, numbers to all digits; the other tables hold
    what the report shows.
    """
    tables = folder / "tables"
    for place in (tables, folder / "figures"):
        place.mkdir(parents=True, exist_ok=True)
    with (tables / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Row.model_fields))
        writer.writeheader()
        writer.writerows(row.model_dump() for row in report.evaluation.results.rows)
    for section in report.sections:
        for sheet in section.tables:
            path = tables / f"{file_name(sheet.name)}.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                cells = csv.writer(file)
                cells.writerow(sheet.header)
                cells.writerows([inline(cell) for cell in line] for line in sheet.lines)
        for figure in section.figures:
            figure.draw(figure_path(folder, figure))
    (folder / "report.md").write_text("\n".join(_markdown(report)) + "\n", "utf-8")


def figure_path(folder: Path, figure: Figure) -> Path:
    """Where a figure's PNG file lies."""
    return folder / "figures" / f"{file_name(figure.name)}.png"


def file_name(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "table"


def _markdown(report: Contents) -> Iterator[str]:
    yield f"# {plain(report.title)}"
    yield "\n## Summary\n"
    yield "In brackets: 95 % interval and number of requests.\n"
    yield from (f"- {plain(sentence)}" for sentence in report.summary.sentences)
    if report.summary.cautions:
        yield "\n## To keep in mind\n"
        yield from (f"- {plain(caution)}" for caution in report.summary.cautions)
    for section in report.sections:
        yield f"\n## {plain(section.title)}\n\n{plain(section.intro)}"
        for figure in section.figures:
            yield f"\n![{plain(figure.alt)}](figures/{file_name(figure.name)}.png)"
            yield f"\n{plain(figure.caption)}"
        for sheet in section.tables:
            yield f"\n### {plain(sheet.title)}\n\n{plain(sheet.caption)}\n"
            yield from table(sheet)
        for title, text in section.code:
            fence = "`" * (2 + max([1, *map(len, re.findall("`+", text))]))
            yield f"\n### {title}\n\n{fence}\n{text}\n{fence}"
    if report.evaluation.lines:
        yield "\nEvery answer is in `report.html` and `samples.jsonl`."
