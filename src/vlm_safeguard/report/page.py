"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.results.folder import read_evaluation
from vlm_safeguard.report.contents import Contents, contents
from vlm_safeguard.report.export import export, figure_path
from vlm_safeguard.report.figures.style import DARK
from vlm_safeguard.report.samples import packed, published
from vlm_safeguard.report.section import Figure
from vlm_safeguard.report.sheets.sheet import is_default

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path, *, withhold: bool = False) -> Path:
    """Write `report.html` into an evaluation's folder, and the same as Markdown, CSV and PNG.

    Args:
        withhold: leave out answers that may be harmful, for a copy that others see.

    Returns:
        The HTML file; beside it are `report.md`, `tables/` and `figures/`.

    Raises:
        SafeguardError: the folder cannot be read or written, or the `report` extra is missing.
    """
    report = contents(read_evaluation(folder))
    path = folder / "report.html"
    try:
        export(report, folder)
        path.write_text(render(report, folder, withhold=withhold), "utf-8")
    except OSError as error:
        raise SafeguardError(f"The report cannot be written into {folder}: {error}") from error
    return path


def render(report: Contents, folder: Path, *, withhold: bool = False) -> str:
    """The page's HTML, with the figures that `export` wrote into `folder`.

    Answers are untrusted: everything is escaped, samples travel as JSON that no parser takes for
    HTML, and the page's policy runs no script but its own.

    Raises:
        SafeguardError: the `report` extra is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise SafeguardError(
            "The report needs jinja2; install it with pip install 'vlm-safeguard[report]'."
        ) from error
    lines = report.evaluation.lines
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    script = (_TEMPLATES / "report.js").read_text("utf-8")
    with TemporaryDirectory() as drawing:
        images = {
            figure.name: _image(figure, figure_path(folder, figure), Path(drawing) / "dark.png")
            for section in report.sections
            for figure in section.figures
        }
    return environment.get_template("report.html.j2").render(
        contents=report,
        images=images,
        is_default=is_default,
        style=Markup((_TEMPLATES / "report.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        samples=Markup(_inert(packed([published(line) for line in lines] if withhold else lines))),
    )


def _image(figure: Figure, light: Path, dark: Path) -> dict[str, Any]:
    """A figure as data addresses for light and dark pages, and its size in pixels."""
    import matplotlib as mpl
    from PIL import Image

    with mpl.rc_context(DARK):
        figure.draw(dark)
    with Image.open(light) as drawn:
        width, height = drawn.size
    return {"light": _address(light), "dark": _address(dark), "width": width, "height": height}


def _address(image: Path) -> str:
    return f"data:image/png;base64,{b64encode(image.read_bytes()).decode()}"


def _unbroken(text: str) -> str:
    """Text whose numbers no line's end parts from what they count: 95 %, n = 100."""
    return re.sub(r"(?<=\d) (?=%)|(?<=\bn) (?==)|(?<=\bn[ \u00a0]=) ", "\u00a0", text)


def _inert(json: str) -> str:
    """JSON in which nothing can end a script element."""
    for character in "<>&\u2028\u2029":
        json = json.replace(character, f"\\u{ord(character):04x}")
    return json
