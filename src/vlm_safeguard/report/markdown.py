"""Tables and text as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vlm_safeguard.report.sheets.sheet import Cell, Sheet, is_default


def table(sheet: Sheet) -> Iterator[str]:
    """A sheet's header and lines; the default guard's name is bold."""
    yield f"| {' | '.join(map(plain, sheet.header))} |"
    yield f"|{'---|' * len(sheet.header)}"
    for name, *cells in sheet.lines:
        first = f"**{plain(name.text)}**" if is_default((name,)) else plain(inline(name))
        yield f"| {' | '.join([first, *(plain(inline(cell)) for cell in cells)])} |"


def inline(cell: Cell) -> str:
    """A cell in one line, its small print in brackets."""
    return f"{cell.text} ({cell.small})" if cell.small else cell.text


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", text).replace("\n", " ")
