"""`vlm-safeguard report`: an evaluation's results as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlm_safeguard.cli.loading import AsJson, console


def report(
    folder: Annotated[
        Path, typer.Argument(help="What an evaluation wrote: results.json and what is beside it.")
    ],
    withhold: Annotated[
        bool,
        typer.Option(
            "--withhold", help="Leave out answers that may be harmful, for a public copy."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write report.html into FOLDER, and the same as Markdown, CSV and PNG."""
    from vlm_safeguard.report.page import write_report

    path = write_report(folder, withhold=withhold)
    if as_json:
        print(json.dumps({"report": str(path)}))
        return
    console(as_json).print(f"report: {path}", markup=False, soft_wrap=True)
