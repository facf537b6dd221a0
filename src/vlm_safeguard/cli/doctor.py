"""`vlm-safeguard doctor`: does the guard work on this model?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from vlm_safeguard.cli.loading import AsJson, Device, Dtype, ModelName, console, load_model

if TYPE_CHECKING:
    from vlm_safeguard.doctor import Check


def doctor(
    model: ModelName = "pocket",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check a model, verified family or not: layers, text-only view, hooks, contracts.

    Exit code 1 where a check fails.
    """
    import torch
    from rich.table import Table

    from vlm_safeguard.doctor import examine

    screen = console(as_json)
    loaded, processor = load_model(model, dtype, device)
    tolerance = 1e-3 if loaded.dtype in (torch.float32, torch.float64) else 0.1

    def report(check: Check) -> None:
        screen.print(f"{'[green]pass' if check.passed else '[red]FAIL'}[/] {check.name}")

    checks = examine(loaded, processor, tolerance=tolerance, report=report)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        table = Table(title=f"{model} ({loaded.config.model_type})")
        for name in ("check", "", "what was found"):
            table.add_column(name)
        for check in checks:
            table.add_row(
                check.name, "[green]pass[/]" if check.passed else "[red]FAIL[/]", check.detail
            )
        screen.print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
