"""`vlm-safeguard eval`: defences side by side on benchmarks; goes on where it stopped."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_safeguard.cli.loading import AsJson, console
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
    model: Annotated[
        str | None,
        typer.Argument(help="'pocket', a Hugging Face Hub id, or a checkpoint folder."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A YAML file that says all of it, as in recipes/.")
    ] = None,
    guard: Annotated[
        str | None, typer.Option(help="A guard's folder or Hub id; fitted if left out.")
    ] = None,
    defence: Annotated[list[str] | None, typer.Option(help="none, default, …; repeat it.")] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=PATH (a local copy, or a Hub data set); repeat it."),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="text, blank, noise, image, own, typographic, folder:DIR; repeat it."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="refusal, llama-guard=MODEL, rubric; repeat it."),
    ] = None,
    grader: Annotated[
        str | None, typer.Option(help="Who grades by rubric: openai/…, vlm-safeguard/MODEL, …")
    ] = None,
    ppl_model: Annotated[
        str | None, typer.Option(help="Scores the answers' perplexity; the model's LLM else.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each benchmark.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws them.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of the answers.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the models run: cpu, cuda, …")] = None,
    out: Annotated[Path, typer.Option(help="Folder for all that comes of it.")] = Path(
        "eval-output"
    ),
    as_json: AsJson = False,
) -> None:
    """Measure defences of a model on benchmarks; options override what --plan says.

    The same command goes on where it stopped. Writes results.json, samples.jsonl, gap.json and
    guard/ into the output's folder, and inspect-ai's logs into its logs/ (inspect view).
    """
    require("eval", "inspect_ai", "yaml")
    given: dict[str, Any] = {
        "model": model,
        "guard": guard,
        "defences": defence,
        "judges": judge,
        "grader": grader,
        "ppl_model": ppl_model,
        "limit": limit,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
        "benchmarks": _benchmarks(benchmark, condition),
    }
    given = {name: value for name, value in given.items() if value is not None}
    screen = console(as_json)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vlm_safeguard.evaluation.plan import plan_of, read_plan
    from vlm_safeguard.evaluation.suite import run

    if plan is None:
        missing = [name for name in ("model", "benchmarks") if name not in given]
        if missing:
            raise SafeguardError(
                f"Say what to evaluate: {' and '.join(missing)} missing, or give a --plan."
            )
        chosen = plan_of(given, "the options")
    else:
        if condition and not benchmark:
            raise SafeguardError("--condition goes with --benchmark; the plan has its own.")
        chosen = plan_of(read_plan(plan).model_dump() | given, f"{plan} with the options")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=screen,
    ) as progress:
        task = progress.add_task("starting", total=None)
        results = run(
            chosen,
            out,
            command=shlex.join(["vlm-safeguard", *sys.argv[1:]]),
            report=lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total
            ),
        )
    if as_json:
        print(results.model_dump_json())
        return
    _show(screen, results, out)


def _benchmarks(names: list[str] | None, conditions: list[str] | None) -> list[Any] | None:
    """Benchmarks as a plan names them, from `NAME` or `NAME=PATH`; all are shown alike."""
    if not names:
        return None
    parted = [name.partition("=") for name in names]
    return [
        {"name": name, "path": path or None, "conditions": conditions or []}
        for name, _, path in parted
    ]


def _show(screen: Console, results: Results, out: Path) -> None:
    from vlm_safeguard.report.names import QUESTIONS
    from vlm_safeguard.report.tables import facts_table, results_table

    cells: dict[tuple[str | None, str | None, str, str], list[Any]] = {}
    for row in results.rows:
        if (row.prompts, row.metric) in _TITLES:
            cells.setdefault((row.benchmark, row.judge, row.prompts, row.metric), []).append(row)
    for (benchmark, judge, prompts, metric), rows in cells.items():
        by = f", judged by {judge}" if judge else ""
        screen.print(results_table(rows, f"{_TITLES[prompts, metric]} ({benchmark}{by})"))
    facts: dict[str, object] = {
        "guarded / unguarded time": f"{results.time_ratio:.2f}×",
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
    facts["written to"] = f"{out}/ (results.json, samples.jsonl, gap.json, guard/, logs/)"
    screen.print(facts_table(facts, "Cost and judges"))
