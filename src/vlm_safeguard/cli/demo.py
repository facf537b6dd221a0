"""`vlm-safeguard demo`: the gap and the guard, measured and drawn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vlm_safeguard.cli.loading import AsJson, Dtype, console
from vlm_safeguard.loading import load_model


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and figures.")] = Path(
        "demo-output"
    ),
    prompts: Annotated[
        int, typer.Option(min=1, max=219, help="Held-out prompts of each kind.")
    ] = 100,
    questions: Annotated[int, typer.Option(min=1, help="Image questions for utility.")] = 120,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 100,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the safety alignment gap on a small real VLM, and what the guard does about it."""
    screen = console(as_json)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vlm_safeguard.evaluation.asks.prompts import read_prompts
    from vlm_safeguard.evaluation.demo import gap_states, run_demo
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.report.figures import gap_figure, guard_figure, refusal_figure
    from vlm_safeguard.report.tables import facts_table, results_table

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    screen.print("[bold]1/4[/bold] The Pocket VLM (first use fetches its base, 98 MB)")
    model, processor = load_model("pocket", dtype)
    screen.print("[bold]2/4[/bold] Fitting a guard: text-only anchor pairs, no training")
    fit_started = time.monotonic()
    guard = Guard.fit(model, processor)
    fit_seconds = time.monotonic() - fit_started
    guard.save_pretrained(out / "guard")
    guard_figure(guard, out / "guard.png")
    screen.print("[bold]3/4[/bold] Held-out prompts, every image condition, every defence")
    harmful, harmless = (read_prompts(kind)[:prompts] for kind in ("harmful", "harmless"))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=screen,
    ) as progress:
        task = progress.add_task("starting", total=None)
        results = run_demo(
            model,
            processor,
            guard,
            harmful,
            harmless,
            questions=questions,
            batch_size=batch_size,
            report=lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total
            ),
        )
    screen.print("[bold]4/4[/bold] Figures")
    gap = gap_states(model, processor, guard, harmful[:25], harmless[:25])
    gap_figure(
        gap.text,
        gap.unguarded,
        gap.guarded,
        out / "gap.png",
        f"The safety alignment gap, layer {gap.layer}: last-token states",
    )
    refusal_figure(
        results.rows,
        out / "refusal.png",
        f"Pocket VLM on held-out prompts (n = {len(harmful)} each)",
    )
    results.details["fit_seconds"] = round(fit_seconds, 1)
    results.details["seconds"] = round(time.monotonic() - started, 1)
    (out / "results.json").write_text(results.model_dump_json(indent=1) + "\n", "utf-8")
    if as_json:
        print(results.model_dump_json())
        return
    refusal = [row for row in results.rows if row.metric == "refusal"]
    utility = [row for row in results.rows if row.metric == "accuracy"]
    screen.print(
        results_table([r for r in refusal if r.prompts == "harmful"], "Harmful: refused"),
        results_table([r for r in refusal if r.prompts == "harmless"], "Harmless: refused"),
        results_table(utility, "Image questions: answered right ('text' is without the image)"),
        facts_table(
            {
                "guarded / unguarded time": f"{results.time_ratio:.2f}×",
                "rows with a closed gate": results.details["closed_gate_rows"],
                "of these, tokens identical": results.details["closed_gate_rows_identical"],
                "fit": f"{fit_seconds:.0f} s",
                "everything": f"{results.details['seconds']:.0f} s",
                "written to": f"{out}/ (results.json, gap.png, refusal.png, guard.png, guard/)",
            },
            "Cost and contract",
        ),
    )
