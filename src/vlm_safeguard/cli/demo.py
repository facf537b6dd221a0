"""`vlm-safeguard demo`: the gap and the guard, measured and drawn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vlm_safeguard.cli.loading import AsJson, Device, Dtype, console
from vlm_safeguard.cli.progress import progress_bar
from vlm_safeguard.loading import Loading, load_model

_GAP = 15  # prompts of each kind in the gap's figure, at most


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and figures.")] = Path(
        "demo-output"
    ),
    prompts: Annotated[
        int, typer.Option(min=1, max=219, help="Held-out prompts of each kind.")
    ] = 20,
    questions: Annotated[int, typer.Option(min=1, help="Image questions for utility.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 50,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the safety alignment gap on a small real VLM, and what the guard does about it."""
    screen = console(as_json)
    from vlm_safeguard.evaluation import demo as measurement
    from vlm_safeguard.evaluation.asks.prompts import read_prompts
    from vlm_safeguard.evaluation.probes.gap import gap_record, gap_states
    from vlm_safeguard.evaluation.results.folder import write_results
    from vlm_safeguard.fit.policy import CALIBRATED
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.vlm import VLM
    from vlm_safeguard.report.figures.bars import refusal_figure
    from vlm_safeguard.report.figures.gap import gap_figure
    from vlm_safeguard.report.figures.guard import guard_figure
    from vlm_safeguard.report.tables import facts_table, results_table

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    screen.print("[bold]1/4[/bold] The Pocket VLM (first use fetches its base, 98 MB)")
    vlm = VLM(*load_model("pocket", Loading(dtype=dtype, device=device)))
    screen.print(
        "[bold]2/4[/bold] Fitting a guard: text-only anchor pairs, no training "
        "(the calibrated gate, from a third of the default's texts)"
    )
    fit_started = time.monotonic()
    guard = Guard.fit(vlm.model, vlm.processor, gate=CALIBRATED)
    fit_seconds = time.monotonic() - fit_started
    guard.save_pretrained(out / "guard")
    guard_figure(guard, out / "guard.png")
    screen.print("[bold]3/4[/bold] Held-out prompts beside images, then images made to attack")
    with progress_bar(screen) as report:
        results = measurement.run(
            vlm,
            guard,
            prompts=prompts,
            questions=questions,
            batch_size=batch_size,
            out=out,
            report=report,
        )
    screen.print("[bold]4/4[/bold] Figures")
    harmful, harmless = (
        [prompt.text for prompt in read_prompts(kind)[: min(prompts, _GAP)]]
        for kind in ("harmful", "harmless")
    )
    gap = gap_states(vlm, guard, harmful, harmless)
    gap_figure(
        gap_record(gap, "blank"),
        out / "gap.png",
        f"The safety alignment gap, layer {gap.layer}: last-token states",
    )
    refusal_figure(
        results.rows,
        out / "refusal.png",
        f"Pocket VLM on held-out prompts (n = {prompts} each)",
    )
    seconds = time.monotonic() - started
    noted = {"fit_seconds": round(fit_seconds, 1), "seconds": round(seconds, 1)}
    results = results.model_copy(update={"other": results.other | noted})
    write_results(out, results)
    if as_json:
        print(results.model_dump_json())
        return
    refusal = [row for row in results.rows if row.metric == "refusal"]
    utility = [row for row in results.rows if row.metric == "accuracy"]
    screen.print(
        results_table([r for r in refusal if r.prompts == "harmful"], "Harmful: refused"),
        results_table([r for r in refusal if r.prompts == "harmless"], "Harmless: refused"),
        results_table(utility, "Image questions: answered right ('text' is without the image)"),
        results_table(
            [
                row.model_copy(update={"condition": "noise" if row.attack == "none" else "made"})
                for row in results.attacks
                if row.metric == "attack_success"
            ],
            "Harmful: followed beside noise, and beside images made to undo the edit (white box)",
        ),
        facts_table(
            {
                "rows with a closed gate": results.closed_gates.answers,
                "of these, answers identical": results.closed_gates.identical,
                "fit": f"{fit_seconds:.0f} s",
                "everything": f"{seconds:.0f} s",
                "written to": f"{out}/ (results.json, gap.png, refusal.png, guard.png, guard/)",
            },
            "Closed gates, and time",
        ),
    )
