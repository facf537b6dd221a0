"""What a report says, in order, before it is HTML or Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vlm_safeguard.evaluation.results.folder import Evaluation
from vlm_safeguard.evaluation.results.measures import (
    accuracy_rows,
    attack_rows,
    chief_judge,
    over_refusal_rows,
)
from vlm_safeguard.evaluation.results.rows import DEFAULT, TEXT, Metric, Row
from vlm_safeguard.report.figures.attacks import attacks_figure
from vlm_safeguard.report.figures.bars import bars_figure
from vlm_safeguard.report.figures.cost import cost_figure
from vlm_safeguard.report.figures.frontier import frontier_figure
from vlm_safeguard.report.figures.gap import gap_figure
from vlm_safeguard.report.figures.guard import auroc_figure, gate_figure, spectra_figure
from vlm_safeguard.report.names import MEASURES, condition_name
from vlm_safeguard.report.section import Figure, Section
from vlm_safeguard.report.sheets.attacks import attack_sheets
from vlm_safeguard.report.sheets.comparisons import mcnemar_sheets
from vlm_safeguard.report.sheets.cost import ratio_sheets
from vlm_safeguard.report.sheets.facts import facts_sheet, glossary_sheet
from vlm_safeguard.report.sheets.frontier import frontier_sheet
from vlm_safeguard.report.sheets.judges import agreement_sheets, refusal_judge_sheet
from vlm_safeguard.report.sheets.measures import metric_sheets
from vlm_safeguard.report.sheets.published import published_sheet
from vlm_safeguard.report.sheets.sheet import Sheet
from vlm_safeguard.report.summary import Summary, judged, summary

if TYPE_CHECKING:
    from vlm_safeguard.evaluation.results.gap import GapRecord
    from vlm_safeguard.evaluation.results.results import Results
    from vlm_safeguard.guard import Guard


@dataclass(frozen=True)
class Contents:
    """The whole report but for the samples."""

    title: str
    evaluation: Evaluation
    summary: Summary
    sections: tuple[Section, ...]


def contents(evaluation: Evaluation) -> Contents:
    """Arrange an evaluation; sections about what was not measured are left out."""
    results = evaluation.results
    sections = (
        *_measures(results),
        _attacks(results),
        Section(
            "comparisons",
            "The default against each other defence",
            "Both answered the same prompts, so they are compared prompt by prompt. p is not "
            f"corrected for the {len(results.comparisons)} tests of this section.",
            tables=tuple(mcnemar_sheets(results.comparisons)),
        ),
        _frontier(results),
        Section(
            "inside",
            "Inside the model",
            "What images do to the model's states, and what the guard was fitted on.",
            (
                *_gap_figures(evaluation.gap),
                *_guard_figures(evaluation.guard, evaluation.gap),
            ),
        ),
        _cost(results),
        Section(
            "judges",
            "Judges",
            "How often the judge of refusals is right, how far judges agree, and how many of their "
            "verdicts could not be read; those count neither as safe nor as unsafe.",
            tables=(
                *([refusal_judge_sheet(judge)] if (judge := results.refusal_judge) else []),
                *agreement_sheets(results.agreement),
                *_sheets(results.rows, "unreadable", folded=True),
            ),
        ),
        _provenance(evaluation),
    )
    return Contents(
        title=f"Safety evaluation of {results.model}",
        evaluation=evaluation,
        summary=summary(evaluation),
        sections=tuple(s for s in sections if s.figures or s.tables or s.code),
    )


def _measures(results: Results) -> tuple[Section, ...]:
    rows = results.rows
    published = published_sheet(results, chief_judge(rows, "attack_success"))
    return (
        Section(
            "attack",
            "Attack success",
            "Share of harmful requests that were followed; lower is safer. "
            f"Summary and figures: {judged(results.findings.attack_judge)}.",
            _bars(attack_rows(rows), "attack success", "requests followed, % (lower is safer)"),
            (
                *([published] if published else []),
                *_sheets(rows, "attack_success", "harmful"),
            ),
        ),
        Section(
            "refusals",
            "Refusals of harmful requests",
            "Share of harmful requests that were refused in words; higher is safer.",
            tables=_sheets(rows, "refusal", "harmful"),
        ),
        Section(
            "over-refusal",
            "Over-refusal",
            "Share of harmless requests that were refused; lower is better.",
            _bars(over_refusal_rows(rows), "over-refusal", "requests refused, % (lower is better)"),
            _sheets(rows, "refusal", "harmless"),
        ),
        Section(
            "utility",
            "Utility",
            "Share of image questions answered right; higher is better.",
            _bars(accuracy_rows(rows), "utility", "answered right, % (higher is better)"),
            _sheets(rows, "accuracy"),
        ),
    )


def _sheets(
    rows: Sequence[Row], metric: Metric, *prompts: str, folded: bool = False
) -> tuple[Sheet, ...]:
    kinds = prompts or ("harmful", "harmless", "utility")
    judge = chief_judge([row for row in rows if row.prompts in kinds], metric)
    return tuple(metric_sheets(rows, metric, kinds, chief=judge, folded=folded))


def _bars(rows: Sequence[Row], what: str, label: str) -> tuple[Figure, ...]:
    by_benchmark: dict[str, list[Row]] = {}
    for row in rows:
        by_benchmark.setdefault(row.benchmark_name, []).append(row)
    figures = []
    for benchmark, group in by_benchmark.items():
        guarded = ", ".join(
            f"{condition_name(row.condition)} {100 * row.value:.0f} %"
            for row in group
            if row.defence == DEFAULT
        )
        figures.append(
            Figure(
                name=f"{what.replace(' ', '_')}_{benchmark}",
                alt=f"Bars of {what} on {benchmark} by defence and image condition. Default guard: "
                f"{guarded or 'not measured'}. The table below has all values.",
                caption=f"{benchmark}: {what}, with 95 % intervals. Green: this guard and its "
                "edits; blue: other defences; orange and red: controls; grey: none.",
                draw=partial(bars_figure, group, label=f"{benchmark}: {label}"),
            )
        )
    return tuple(figures)


def _attacks(results: Results) -> Section:
    rows = attack_rows(results.attacks)
    conditions = dict.fromkeys(row.condition for row in rows if row.condition != TEXT)
    figures = tuple(
        Figure(
            f"attacks_{condition}",
            f"Attack success by attack and ε for each defence, {name}. The table below has all "
            "values.",
            f"Attack success under attack, {name}, with 95 % intervals.",
            partial(attacks_figure, [r for r in rows if r.condition in (TEXT, condition)]),
        )
        for condition in conditions
        for name in [condition_name(condition)]
    )
    return Section(
        "attacks",
        "Attacks that know the defence",
        "Share of harmful requests that were followed when the image, the answer's beginning or "
        "the request's end was made for it, with the defence at work; lower is safer. What an "
        "attack optimised is never what is counted: answers are judged.",
        figures,
        tuple(attack_sheets(rows)),
    )


def _frontier(results: Results) -> Section:
    settings = results.frontier
    figure = Figure(
        "frontier",
        f"Attack success against over-refusal at {len(settings)} settings of the guard. The table "
        "below has all values.",
        "Attack success against over-refusal as the settings sweep, with 95 % intervals.",
        partial(frontier_figure, settings),
    )
    return Section(
        "frontier",
        "Frontier",
        "Each line turns one knob of the guard and keeps the rest; further down and to the left "
        "is better. The ends of a line carry their settings.",
        (figure,) if settings else (),
        (frontier_sheet(settings),) if settings else (),
    )


def _gap_figures(gap: GapRecord | None) -> tuple[Figure, ...]:
    if gap is None:
        return ()
    return (
        Figure(
            "gap",
            f"Two scatter plots of last-token states at layer {gap.layer}, unguarded and "
            "edited. Circles: requests as text; triangles: with an image; harmful and "
            "harmless in two colours.",
            "The gap: where requests land with an image (triangles), against where they "
            "belong as text (circles), in the text's first two principal components; on the right "
            "under VLM-Guard's edit.",
            partial(gap_figure, gap, title=f"Layer {gap.layer}: last-token states"),
        ),
    )


def _guard_figures(guard: Guard | None, gap: GapRecord | None) -> tuple[Figure, ...]:
    if guard is None:
        return ()
    layers = guard.policy.layers
    window = f"{layers[0]}–{layers[-1]}"
    auroc = guard.policy.directions.auroc[list(layers)]
    return (
        Figure(
            "auroc",
            "AUROC of the harm score by decoder layer; in the edited layers "
            f"{window} it is {float(auroc.min()):.2f} to {float(auroc.max()):.2f} on anchors "
            "held out.",
            "How well each layer tells harm from harmlessness; 0.5 is chance.",
            partial(auroc_figure, guard, gap.auroc if gap else {}),
        ),
        Figure(
            "spectra",
            "Share of the energy of each singular value of the anchors' differences, in the "
            "first, middle and last edited layer.",
            "Singular spectra of the anchors' differences: how many directions there are.",
            partial(spectra_figure, guard),
        ),
        Figure(
            "gate",
            "Histograms of the gate's text score for harmful and harmless anchors and "
            "calibration requests.",
            "What the gate decides on. Where the text scores above the threshold it opens.",
            partial(gate_figure, guard),
        ),
    )


def _cost(results: Results) -> Section:
    rows, ratios = results.rows, results.cost_ratios
    figure = Figure(
        "cost",
        "Tokens, seconds and perplexity of each defence over the unguarded model's. The table "
        "below has all values.",
        "Tokens, seconds and perplexity over the unguarded model's, with 95 % intervals.",
        partial(cost_figure, ratios),
    )
    return Section(
        "cost",
        "Cost and fluency",
        "What a defence adds to tokens, time and perplexity, and how far it moves the model "
        "on harmless requests. 1× is the model as it is.",
        (figure,) if ratios else (),
        (
            *ratio_sheets(ratios),
            *_sheets(rows, "kl"),
            *_sheets(rows, "perplexity", folded=True),
            *_sheets(rows, "tokens", folded=True),
            *_sheets(rows, "seconds", folded=True),
        ),
    )


def _provenance(evaluation: Evaluation) -> Section:
    results, guard = evaluation.results, evaluation.guard
    run = results.provenance
    facts: dict[str, object] = {
        "model": results.model,
        "started": run.started,
        "seconds": run.seconds,
        "seed": run.seed,
        **run.versions,
        **run.machine,
    }
    if guard is not None:
        policy = guard.policy
        facts["guard"] = (
            f"{policy.edit.name}, layers {policy.layers[0]}–{policy.layers[-1]}, "
            f"rank {policy.rank}, gate {', '.join(criterion.name for criterion in policy.gate)}"
        )
        facts["anchors"] = guard.provenance.anchors_sha256
    counts = results.model_dump(
        mode="json",
        include={"time_ratio_range", "closed_gates", "unreadable", "other"},
        exclude_defaults=True,
    )
    code = {
        "Command": run.command,
        "Plan": json.dumps(run.plan, indent=2) if run.plan else "",
        "Other counts": json.dumps(counts, indent=2) if counts else "",
    }
    return Section(
        "provenance",
        "How this was made",
        f"{MEASURES['attack_success'].capitalize()} and refusals carry Wilson's 95 % intervals, "
        "means a bootstrap's.",
        tables=(
            glossary_sheet([*results.rows, *results.attacks]),
            facts_sheet(
                "provenance",
                "Versions, seed and machine",
                "What it was made with.",
                {name: value for name, value in facts.items() if value is not None},
            ),
        ),
        code=tuple((title, text) for title, text in code.items() if text),
    )
