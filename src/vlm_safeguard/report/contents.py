"""What a report says, in order, before it is HTML or Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.report import figures, sheets
from vlm_safeguard.report.findings import (
    Findings,
    accuracy_rows,
    attack_rows,
    chief_judge,
    findings,
    refusal_rows,
)
from vlm_safeguard.report.names import DEFAULT, MEASURES, condition_name
from vlm_safeguard.report.ratios import Ratio, paired_ratios
from vlm_safeguard.report.sheets import Sheet, benchmark_of
from vlm_safeguard.report.source import Setting, Source


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: of its file, without an ending.
        alt: what it shows, for who cannot see it.
        caption: a sentence below it.
        draw: writes it to a PNG file.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Section:
    """One section: a heading, what to know, figures and tables.

    Attributes:
        code: text to be shown as it is, with what it is.
    """

    name: str
    title: str
    intro: str
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Sheet, ...] = ()
    code: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Contents:
    """The whole report but for the samples."""

    title: str
    source: Source
    findings: Findings
    sections: tuple[Section, ...]


def contents(source: Source) -> Contents:
    """Arrange an evaluation's output; sections about what was not measured are left out."""
    results, details = source.results, source.details
    rows = results.rows
    ratios = paired_ratios(source.lines)
    attacked, how = attack_rows(rows)
    published = sheets.published_sheet(results, chief_judge(rows, "attack_success"))
    made = [
        Section(
            "attack",
            "Attack success",
            "Share of harmful requests that were followed; lower is safer. "
            f"Summary and figures: {how}.",
            _bars(attacked, "attack success", "requests followed, % (lower is safer)"),
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
            _bars(refusal_rows(rows), "over-refusal", "requests refused, % (lower is better)"),
            _sheets(rows, "refusal", "harmless"),
        ),
        Section(
            "utility",
            "Utility",
            "Share of image questions answered right; higher is better.",
            _bars(accuracy_rows(rows), "utility", "answered right, % (higher is better)"),
            _sheets(rows, "accuracy"),
        ),
        Section(
            "comparisons",
            "The default against each other defence",
            "Both answered the same prompts, so they are compared prompt by prompt. p is not "
            f"corrected for the {len(details.mcnemar)} tests of this section.",
            tables=tuple(sheets.mcnemar_sheets(details.mcnemar)),
        ),
        _frontier(details.frontier),
        _gap(source),
        Section(
            "cost",
            "Cost and fluency",
            "What a defence adds to tokens, time and perplexity, and how far it moves the model "
            "on harmless requests. 1× is the model as it is.",
            (_cost_picture(ratios),) if ratios else (),
            (
                *sheets.ratio_sheets(ratios),
                *_sheets(rows, "kl"),
                *_sheets(rows, "perplexity", folded=True),
                *_sheets(rows, "tokens", folded=True),
                *_sheets(rows, "seconds", folded=True),
            ),
        ),
        Section(
            "judges",
            "Judges",
            "How far the judges agree, and how many of their verdicts could not be read; those "
            "count neither as safe nor as unsafe.",
            tables=(
                *sheets.agreement_sheets(details.agreement),
                *_sheets(rows, "unreadable", folded=True),
            ),
        ),
        _provenance(source),
    ]
    return Contents(
        title=f"Safety evaluation of {results.model}",
        source=source,
        findings=findings(source, ratios),
        sections=tuple(s for s in made if s.pictures or s.tables or s.code),
    )


def _sheets(
    rows: Sequence[Row], metric: str, *prompts: str, folded: bool = False
) -> tuple[Sheet, ...]:
    kinds = prompts or ("harmful", "harmless", "utility")
    judge = chief_judge([r for r in rows if r.prompts in kinds], metric)
    return tuple(sheets.metric_sheets(rows, metric, kinds, chief=judge, folded=folded))


def _bars(rows: Sequence[Row], what: str, label: str) -> tuple[Picture, ...]:
    pictures = []
    for benchmark in dict.fromkeys(map(benchmark_of, rows)):
        here = [row for row in rows if benchmark_of(row) == benchmark]
        seen = [
            f"{condition_name(r.condition)} {100 * r.value:.0f} %"
            for r in here
            if r.defence == DEFAULT
        ]
        pictures.append(
            Picture(
                name=f"{what.replace(' ', '_')}_{benchmark}",
                alt=f"Bars of {what} on {benchmark} by defence and image condition. Default guard: "
                f"{', '.join(seen) or 'not measured'}. The table below has all values.",
                caption=f"{benchmark}: {what}, with 95 % intervals. Green: this guard's edits; "
                "blue: defences by others; orange and red: controls; grey: none.",
                draw=partial(figures.bars_figure, here, label=f"{benchmark}: {label}"),
            )
        )
    return tuple(pictures)


def _frontier(points: Sequence[Setting]) -> Section:
    return Section(
        "frontier",
        "Frontier",
        "Each line turns one knob of the guard and keeps the rest; further down and to the left "
        "is better. The ends of a line carry their settings.",
        (
            Picture(
                "frontier",
                f"Attack success against over-refusal at {len(points)} settings of strength and "
                "threshold. The table below has all values.",
                "Attack success against over-refusal as strength and threshold sweep, with 95 % "
                "intervals.",
                partial(figures.frontier_figure, points),
            ),
        )
        if points
        else (),
        (sheets.frontier_sheet(points),) if points else (),
    )


def _gap(source: Source) -> Section:
    pictures = []
    gap, guard = source.gap, source.guard
    if gap is not None:
        pictures.append(
            Picture(
                "gap",
                f"Two scatter plots of last-token states at layer {gap.layer}, unguarded and "
                "guarded. Circles: requests as text; triangles: with an image; harmful and "
                "harmless in two colours.",
                "The gap: where requests land with an image (triangles), against where they "
                "belong as text (circles), in the text's first two principal components.",
                partial(
                    figures.gap_figure,
                    gap.text.tensors(),
                    gap.unguarded.tensors(),
                    gap.guarded.tensors(),
                    title=f"Layer {gap.layer}: last-token states",
                    condition=gap.condition,
                ),
            )
        )
    if guard is not None:
        window = f"{guard.policy.layers[0]}–{guard.policy.layers[-1]}"
        auroc = guard.policy.directions.auroc[list(guard.policy.layers)]
        pictures += [
            Picture(
                "auroc",
                "AUROC of the harm score by decoder layer; in the edited layers "
                f"{window} it is {float(auroc.min()):.2f} to {float(auroc.max()):.2f} on anchors "
                "held out.",
                "How well each layer tells harm from harmlessness; 0.5 is chance.",
                partial(figures.auroc_figure, guard, gap.auroc if gap else {}),
            ),
            Picture(
                "spectra",
                "Share of the energy of each singular value of the anchors' differences, in the "
                "first, middle and last edited layer.",
                "Singular spectra of the anchors' differences: how many directions there are.",
                partial(figures.spectra_figure, guard),
            ),
            Picture(
                "gate",
                "Histograms of the gate's text score for harmful and harmless anchors and "
                "calibration requests.",
                "What the gate decides on. Where the text scores above the threshold it opens.",
                partial(figures.gate_figure, guard),
            ),
        ]
    return Section(
        "inside",
        "Inside the model",
        "What images do to the model's states, and what the guard was fitted on.",
        tuple(pictures),
    )


def _cost_picture(ratios: Sequence[Ratio]) -> Picture:
    return Picture(
        "cost",
        "Tokens, seconds and perplexity of each defence over the unguarded model's. The table "
        "below has all values.",
        "Tokens, seconds and perplexity over the unguarded model's, with 95 % intervals.",
        partial(figures.cost_figure, ratios),
    )


def _provenance(source: Source) -> Section:
    results = source.results
    made = source.details.provenance
    facts = {
        "model": results.model,
        **{name: made[name] for name in ("started", "seconds", "seed") if name in made},
        **made.get("versions", {}),
        **made.get("machine", {}),
    }
    if source.guard is not None:
        policy = source.guard.policy
        facts["guard"] = (
            f"{policy.edit.name}, layers {policy.layers[0]}–{policy.layers[-1]}, "
            f"rank {policy.rank}, gate {', '.join(criterion.name for criterion in policy.gate)}"
        )
        facts["anchors"] = source.guard.provenance.anchors_sha256
    shown = {"mcnemar", "frontier", "agreement", "provenance"}
    rest = {name: value for name, value in results.details.items() if name not in shown}
    code = [
        (title, value if isinstance(value, str) else json.dumps(value, indent=2))
        for title, value in (
            ("Command", made.get("command")),
            ("Plan", made.get("plan")),
            ("Other details", rest),
        )
        if value
    ]
    return Section(
        "provenance",
        "How this was made",
        f"{MEASURES['attack_success'].capitalize()} and refusals carry Wilson's 95 % intervals, "
        "means a bootstrap's.",
        tables=(
            sheets.glossary_sheet(results.rows),
            sheets.facts_sheet(
                "provenance", "Versions, seed and machine", "What it was made with.", facts
            ),
        ),
        code=tuple(code),
    )
