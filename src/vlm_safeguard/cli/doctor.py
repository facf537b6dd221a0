"""`vlm-safeguard doctor`: does the guard work on this model?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.cli.loading import AsJson, GuardName, ModelName, console, loads_a_model
from vlm_safeguard.loading import Loading, load_model, quantized_by, read_guard

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_safeguard.doctor import Check
    from vlm_safeguard.timing import Ratio

_FLOAT32_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1  # of the logits' spread


@loads_a_model
def doctor(
    model: ModelName = "pocket",
    guard: GuardName = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use no network: only what is on this machine.")
    ] = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Check a model, verified family or not: layers, text-only view, hooks, contracts.

    With --guard, also whether that guard is for this model. Exit code 1 where a check fails.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, further down
    import torch

    from vlm_safeguard.doctor import Examination

    screen = console(as_json)
    loaded, processor = load_model(model, loading)
    packing = quantized_by(loaded.config)
    whole = packing is None and loaded.dtype in (torch.float32, torch.float64)
    examination = Examination(
        loaded,
        processor,
        given=None if guard is None else read_guard(guard),
        tolerance=_FLOAT32_TOLERANCE if whole else _HALF_TOLERANCE,
    )

    checks = examination.run(lambda check: screen.print(_mark(check), check.name))
    passed = all(check.passed for check in checks)
    facts: dict[str, Any] = examination.facts() if checks[0].passed else {}
    if packing is not None:
        facts["quantized by"] = packing
    ratio = examination.time_ratio() if passed else None
    if as_json:
        outcome = {
            "passed": passed,
            "facts": facts,
            "checks": [asdict(check) for check in checks],
            "time_ratio": None if ratio is None else asdict(ratio),
        }
        print(json.dumps(outcome, indent=1))
    else:
        screen.print(_table(f"{model} ({loaded.config.model_type})", checks, ratio, facts))
    if not passed:
        raise typer.Exit(1)


def _mark(check: Check) -> str:
    return "[green]pass[/]" if check.passed else "[red]FAIL[/]"


def _table(
    title: str, checks: Sequence[Check], ratio: Ratio | None, facts: Mapping[str, Any]
) -> Table:
    """Checks first, then the time that the guard takes and what was examined."""
    from rich.markup import escape
    from rich.table import Table

    from vlm_safeguard.timing import TIMED_TOKENS

    table = Table(title=title)
    for name in ("check", "", "detail"):
        table.add_column(name)
    for check in checks:
        table.add_row(check.name, _mark(check), escape(check.detail))
    table.add_section()
    if ratio is not None:
        table.add_row("time", "", f"guarded / unguarded, {TIMED_TOKENS} tokens: {ratio}")
    for name, fact in facts.items():
        parts = fact if isinstance(fact, dict) else {"": fact}
        lines = [f"{part} {value}".strip() for part, value in parts.items()]
        table.add_row(name, "", escape("\n".join(lines)))
    return table
