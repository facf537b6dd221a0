"""`vlm-safeguard families`: which vision-language families are verified, and which refused."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlm_safeguard.cli.loading import AsJson, console


def families(
    status: Annotated[
        str | None, typer.Option(help="Only those that are 'verified' or 'refused'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every vision-language model type that transformers knows, and what the guard does."""
    from rich.table import Table

    from vlm_safeguard.errors import SafeguardError
    from vlm_safeguard.model.families import every_family

    if status not in (None, "verified", "refused"):
        raise SafeguardError(f"There is no status '{status}'; there are verified and refused.")
    rows = [row for row in every_family() if status in (None, row["status"])]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title="Vision-language model types")
    for name in ("type", "status", "media guarded", "media refused", "why"):
        table.add_column(name)
    for row in rows:
        style = "green" if row["status"] == "verified" else "red"
        table.add_row(
            row["type"],
            f"[{style}]{row['status']}[/]",
            ", ".join(row["media"]),
            ", ".join(row["refused media"]),
            row["reason"] or "",
        )
    screen = console(as_json)
    screen.print(table)
    verified = sum(row["status"] == "verified" for row in rows)
    screen.print(
        f"{verified} verified, {len(rows) - verified} refused. To check a model of "
        "your own: vlm-safeguard doctor MODEL"
    )
