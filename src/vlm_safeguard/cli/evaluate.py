"""`vlm-safeguard eval`: defences side by side on benchmarks; goes on where it stopped."""

from __future__ import annotations

import shlex
import sys
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.cli.loading import AsJson, console
from vlm_safeguard.cli.model_options import was_given
from vlm_safeguard.cli.plan_options import plan_options
from vlm_safeguard.cli.progress import progress_bar
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from vlm_safeguard.evaluation.results.results import Results

_TITLES = {
    ("harmful", "attack_success"): "Harmful: the attack got through",
    ("harmful", "refusal"): "Harmful: refused",
    ("harmless", "refusal"): "Harmless: refused",
    ("utility", "accuracy"): "Questions: answered right",
}


def evaluate(
    context: typer.Context,
    plan: Annotated[
        Path | None, typer.Option(help="A YAML file that says all of it, as in recipes/.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for all that comes of it.")] = Path(
        "eval-output"
    ),
    as_json: AsJson = False,
    **fields: Any,
) -> None:
    """Measure defences of a model on benchmarks; options override what --plan says.

    The same command goes on where it stopped. Writes results.json, samples.jsonl, gap.json and
    guard/ into the output's folder, and inspect-ai's logs into its logs/ (inspect view).
    """
    require("eval", "inspect_ai", "yaml")
    given = {name: value for name, value in fields.items() if was_given(context, name)}
    conditions = given.pop("conditions", [])
    if "benchmarks" in given:
        given["benchmarks"] = [_benchmark(name, conditions) for name in given["benchmarks"]]
    elif conditions:
        raise SafeguardError("--condition goes with --benchmark; a plan has its own.")
    elif plan is None:
        raise SafeguardError("Say what to evaluate: name a --benchmark, or give a --plan.")
    screen = console(as_json)
    from vlm_safeguard.evaluation.plan import plan_of, read_plan
    from vlm_safeguard.evaluation.suite import run

    if plan is None:
        whole = plan_of(given, "the options")
    else:
        whole = plan_of(read_plan(plan).model_dump() | given, f"{plan} with the options")
    with progress_bar(screen) as report:
        results = run(
            whole,
            out,
            command=shlex.join(["vlm-safeguard", *sys.argv[1:]]),
            report=report,
        )
    if as_json:
        print(results.model_dump_json())
        return
    _show(screen, results, out)


def _benchmark(name: str, conditions: list[str]) -> dict[str, Any]:
    """A benchmark as a plan names it, from `NAME` or `NAME=PATH`."""
    name, _, path = name.partition("=")
    return {"name": name, "path": path or None, "conditions": conditions}


def _signature() -> Signature:
    """The command's own parameters, and a plan's in place of `fields`."""
    own = signature(evaluate, eval_str=True).parameters.values()
    return Signature([*(each for each in own if each.name != "fields"), *plan_options()])


evaluate.__signature__ = _signature()  # type: ignore[attr-defined]  # which typer reads


def _show(screen: Console, results: Results, out: Path) -> None:
    from vlm_safeguard.evaluation.results.folder import GAP, RESULTS, SAMPLES
    from vlm_safeguard.evaluation.results.measures import attack_rows
    from vlm_safeguard.report.names import QUESTIONS
    from vlm_safeguard.report.sheets.attacks import column_name
    from vlm_safeguard.report.tables import facts_table, results_table

    cells: dict[tuple[str | None, str | None, str, str], list[Any]] = {}
    for row in results.rows:
        if (row.prompts, row.metric) in _TITLES:
            cells.setdefault((row.benchmark, row.judge, row.prompts, row.metric), []).append(row)
    for (benchmark, judge, prompts, metric), rows in cells.items():
        by = f", judged by {judge}" if judge else ""
        screen.print(results_table(rows, f"{_TITLES[prompts, metric]} ({benchmark}{by})"))
    attacks = [
        row.model_copy(update={"condition": column_name(row)})
        for row in attack_rows(results.attacks)
    ]
    if attacks:
        screen.print(results_table(attacks, "Under attack: the attack got through"))
    facts: dict[str, object] = {}
    if results.time_ratio:
        facts["guarded / unguarded time"] = f"{results.time_ratio:.2f}×"
    facts |= {
        "rows with a closed gate": results.closed_gates.answers,
        "of these, answers identical": results.closed_gates.identical,
    }
    for pair in results.agreement:
        kappa = "" if pair.kappa is None else f"κ = {pair.kappa:.2f}, "
        judges = f"{pair.judge_a} and {pair.judge_b}"
        facts[f"{judges} agree on {QUESTIONS[pair.question]}"] = f"{kappa}n = {pair.n}"
    for judge, count in results.unreadable.items():
        if count:
            facts[f"unreadable to {judge}"] = f"{count} answers"
    facts["everything"] = f"{results.provenance.seconds:.0f} s"
    written = [name for name in (RESULTS, SAMPLES, GAP) if (out / name).is_file()]
    facts["written to"] = f"{out}/ ({', '.join(written)}, guard/, logs/)"
    screen.print(facts_table(facts, "Cost and judges"))
