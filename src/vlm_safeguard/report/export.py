"""The report as Markdown, CSV and PNG files, for papers and pull requests."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.report.contents import Contents, Picture
from vlm_safeguard.report.findings import Aim
from vlm_safeguard.report.sheets import Cell, Sheet

HOLDS = {True: "holds", False: "does not hold", None: "not measured"}


def export(found: Contents, folder: Path) -> None:
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
        writer.writerows(row.model_dump() for row in found.source.results.rows)
    for section in found.sections:
        for table in section.tables:
            path = tables / f"{file_name(table.name)}.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                plain = csv.writer(file)
                plain.writerow(table.header)
                plain.writerows([_inline(cell) for cell in line] for line in table.lines)
        for picture in section.pictures:
            picture.draw(figure_path(folder, picture))
    (folder / "report.md").write_text("\n".join(_markdown(found)) + "\n", "utf-8")


def figure_path(folder: Path, picture: Picture) -> Path:
    """Where a figure's PNG file lies."""
    return folder / "figures" / f"{file_name(picture.name)}.png"


def file_name(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "table"


def _inline(cell: Cell) -> str:
    return f"{cell.text} ({cell.small})" if cell.small else cell.text


def _markdown(found: Contents) -> Iterator[str]:
    yield f"# {_plain(found.title)}"
    yield "\n## Summary\n"
    yield "In brackets: 95 % interval and number of requests.\n"
    yield from (f"- {_plain(sentence)}" for sentence in found.findings.sentences)
    yield "\n## What holds and what does not\n"
    for aim in found.findings.aims:
        yield from _aim(aim)
    if found.findings.cautions:
        yield "\n## To keep in mind\n"
        yield from (f"- {_plain(caution)}" for caution in found.findings.cautions)
    for section in found.sections:
        yield f"\n## {_plain(section.title)}\n\n{_plain(section.intro)}"
        for picture in section.pictures:
            yield f"\n![{_plain(picture.alt)}](figures/{file_name(picture.name)}.png)"
            yield f"\n{_plain(picture.caption)}"
        for table in section.tables:
            yield from _table(table)
        for title, text in section.code:
            fence = "`" * (2 + max([1, *map(len, re.findall("`+", text))]))
            yield f"\n### {title}\n\n{fence}\n{text}\n{fence}"
    if found.source.lines:
        yield "\nEvery answer is in `report.html` and `samples.jsonl`."


def _aim(aim: Aim) -> Iterator[str]:
    yield f"- **{_plain(aim.name)} – {HOLDS[aim.holds]}.** {_plain(aim.measured)}"
    yield from (f"  - {_plain(failure)}" for failure in aim.failures)


def _table(table: Sheet) -> Iterator[str]:
    yield f"\n### {_plain(table.title)}\n\n{_plain(table.caption)}\n"
    yield f"| {' | '.join(map(_plain, table.header))} |"
    yield f"|{'---|' * len(table.header)}"
    for line in table.lines:
        yield f"| {' | '.join(_plain(_inline(cell)) for cell in line)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", text).replace("\n", " ")
