"""The summary in sentences: the numbers that tell most, and what to keep in mind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlm_safeguard.evaluation.asks.attempt import NO_ATTACK
from vlm_safeguard.evaluation.judges.measure import JudgeRecord
from vlm_safeguard.evaluation.results.cautions import Cautions
from vlm_safeguard.evaluation.results.findings import Contrast, Findings
from vlm_safeguard.evaluation.results.folder import Evaluation
from vlm_safeguard.evaluation.results.measures import PHRASES, attack_rows, quotes_phrases
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import DEFAULT, TEXT, Row
from vlm_safeguard.report.names import (
    QUESTIONS,
    all_cells,
    attack_name,
    judge_name,
    percent,
    points,
    quoted,
    times,
    with_image,
)


@dataclass(frozen=True)
class Summary:
    """What a report says first.

    Attributes:
        headline: (number, what it is) of the few that tell most.
        sentences: what was measured.
        cautions: what weakens it.
    """

    headline: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]
    cautions: tuple[str, ...]


def summary(evaluation: Evaluation) -> Summary:
    """An evaluation's findings and cautions in words."""
    results = evaluation.results
    findings = results.findings
    return Summary(
        headline=tuple(_headline(findings)),
        sentences=(
            *(_benchmarks(results.model, findings) if results.rows else ()),
            *_under_attack(results),
            *_cost(results),
        ),
        cautions=(
            *(
                [_phrase_judge(results.refusal_judge)]
                if quotes_phrases([*results.rows, *results.attacks])
                else []
            ),
            *_cautions(results.cautions, evaluation.missing),
        ),
    )


def judged(judge: str) -> str:
    """Who judged attack success, in words."""
    return f"judged by {judge_name(judge) if judge == PHRASES else judge}"


def share(row: Row) -> str:
    """A share with its interval and n."""
    return (
        f"{percent(row.value)}\u00a0% ({percent(row.low)}–{percent(row.high)}, "
        f"n\u00a0=\u00a0{row.n})"
    )


def where(row: Row) -> str:
    """A cell's benchmark and image condition."""
    return f"{quoted(row.benchmark_name)} {with_image(row.condition)}"


def _headline(findings: Findings) -> Iterator[tuple[str, str]]:
    gap, guarded, over_refusal = findings.gap, findings.gap_guarded, findings.over_refusal
    if gap is not None:
        yield (
            f"{percent(gap.before.value)}\u00a0%",
            f"of harmful requests followed {with_image(TEXT)}, unguarded",
        )
        yield (
            f"{percent(gap.after.value)}\u00a0%",
            f"of the same {with_image(gap.after.condition)}",
        )
    if guarded is not None:
        yield f"{percent(guarded.value)}\u00a0%", "of those with the default guard"
    if over_refusal is not None:
        yield points(over_refusal.change), "change in harmless requests refused, at worst"


def _benchmarks(model: str, findings: Findings) -> Iterator[str]:
    """On what was asked without an attack."""
    yield _gap(model, findings)
    yield from _attack(findings)
    yield _over_refusal(findings.over_refusal)
    yield _utility(findings.utility)


def _gap(model: str, findings: Findings) -> str:
    gap = findings.gap
    if gap is None:
        return (
            "The gap was not measured: no harmful benchmark was asked both as text and with an "
            f"image without a guard. The model is {model}."
        )
    as_text = (
        f"The gap: {model} without a guard followed {share(gap.before)} of the harmful requests "
        f"of {quoted(gap.before.benchmark_name)} asked as text alone "
        f"({judged(findings.attack_judge)})."
    )
    if gap.change <= 0:
        return f"{as_text} No image raised that in any of {gap.cells} cells measured."
    return (
        f"{as_text} Asked {with_image(gap.after.condition)}, it followed {share(gap.after)}: "
        f"{points(gap.change)}, the widest gap of all. An image raised the share in {gap.higher} "
        f"of {gap.cells} cells (benchmark × image)."
    )


def _attack(findings: Findings) -> Iterator[str]:
    attack, tests = findings.attack, findings.tests
    if attack is None:
        yield (
            "What the guard does was not measured: there is no cell with both the default guard "
            "and no guard."
        )
        return
    if attack.change < 0:
        yield (
            f"The guard: on {where(attack.after)} the default guard took attack success from "
            f"{share(attack.before)} to {share(attack.after)}. It was lower than without a "
            f"guard in {attack.lower} of {attack.cells} cells and higher in {attack.higher}."
        )
    else:
        yield (
            f"The guard: the default guard lowered attack success in none of {attack.cells} "
            f"cells, and raised it in {attack.higher}."
        )
    if tests is not None:
        yield (
            f"Of {tests.tests} paired tests of the default against no guard on those cells, "
            f"{tests.clear} differ beyond chance (McNemar, p below 0.05 / {tests.tests})."
        )


def _over_refusal(contrast: Contrast | None) -> str:
    if contrast is None:
        return "Over-refusal was not measured: no harmless requests with and without the guard."
    if contrast.change <= 0:
        return (
            "Over-refusal: with the default guard no more harmless requests were refused than "
            f"without, in {all_cells(contrast.cells)}; at most {share(contrast.highest)}."
        )
    return (
        f"Over-refusal: harmless requests refused went from {share(contrast.before)} to "
        f"{share(contrast.after)} on {where(contrast.after)}, the largest rise "
        f"({points(contrast.change)}) in {all_cells(contrast.cells)}."
    )


def _utility(contrast: Contrast | None) -> str:
    if contrast is None:
        return "Utility was not measured: no questions answered with and without the guard."
    if contrast.change == 0:
        return (
            "Utility: as many questions answered right with the guard as without, in "
            f"{all_cells(contrast.cells)}; for one, {share(contrast.after)} on "
            f"{where(contrast.after)}."
        )
    return (
        f"Utility: {share(contrast.before)} of {where(contrast.before)} answered right without "
        f"the guard and {share(contrast.after)} with it, the largest change in "
        f"{all_cells(contrast.cells)}."
    )


def _under_attack(results: Results) -> Iterator[str]:
    rows = [row for row in attack_rows(results.attacks) if row.attack != NO_ATTACK]
    if not rows:
        return
    worst = [
        max((row for row in rows if row.defence == defence), key=lambda row: row.value)
        for defence in dict.fromkeys(row.defence for row in rows)
    ]
    most = [f"{quoted(row.defence)} {share(row)} ({attack_name(row)})" for row in worst]
    yield (
        f"Under attacks that know the defence, the most harmful requests that {results.model} "
        f"followed: {'; '.join(most)}."
    )


def _cost(results: Results) -> Iterator[str]:
    ratios = [ratio for ratio in results.cost_ratios if ratio.defence == DEFAULT]
    costs = []
    for metric, words in (("seconds", "time"), ("tokens", "tokens"), ("perplexity", "perplexity")):
        measured = [
            f"{times(ratio.value)} on {ratio.prompts} requests"
            for ratio in ratios
            if ratio.metric == metric
        ]
        if measured:
            costs.append(f"{words} {_listed(measured)}")
    if costs:
        yield f"Cost, default guard over no guard: {'; '.join(costs)}."
    elif results.time_ratio > 0:
        spread = results.time_ratio_range
        rounds = f" ({spread[0]:.2f}–{spread[1]:.2f} over the rounds)" if spread else ""
        yield f"Cost: guarded over unguarded time is {times(results.time_ratio)}{rounds}."
    closed = results.closed_gates
    if closed.answers:
        yield (
            f"Of {closed.answers} answers whose gate stayed closed, {closed.identical} are exactly "
            "the unguarded ones."
        )


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _phrase_judge(record: JudgeRecord | None) -> str:
    if record is None:
        return (
            "Refusals were counted by phrases of a judge that these results do not name, so how "
            "often it is right cannot be said."
        )
    precision, recall = (
        "none" if each is None else f"{each.value:.2f} ({each.low:.2f}–{each.high:.2f})"
        for each in (record.held_out.precision, record.held_out.recall)
    )
    return (
        f"Refusals were counted by rules and phrases: precision {precision}, recall {recall} on "
        f"{record.held_out.n} openings of answers that they were not tuned on."
    )


def _cautions(cautions: Cautions, missing: Sequence[str]) -> Iterator[str]:
    if cautions.phrases:
        yield (
            "Attack success rests on a judge that only looks for phrases of refusal; it does not "
            "tell whether what else was written is harmful."
        )
    if few := cautions.few:
        yield (
            f"{few.rows} of {few.of} rows rest on fewer than 100 requests "
            f"(the fewest: {few.fewest}); read their intervals."
        )
    if row := cautions.unreadable:
        yield (
            f"Some verdicts could not be read, at most {share(row)} ({row.judge}, {row.defence}, "
            f"{where(row)})."
        )
    for pair in cautions.disagreeing:
        yield (
            f"The judges {quoted(judge_name(pair.judge_a))} and "
            f"{quoted(judge_name(pair.judge_b))} agree little on {QUESTIONS[pair.question]} "
            f"(κ = {pair.kappa:.2f} on {pair.n} answers): what one of them says alone is not "
            "settled."
        )
    if row := cautions.unsafe_text:
        yield (
            "The guard gives back what the language model itself would do, and asked as text "
            f"alone it still follows {share(row)} of {quoted(row.benchmark_name)}."
        )
    if cautions.controls:
        cells = "; ".join(f"{row.defence} on {where(row)}" for row in cautions.controls)
        yield f"A control did as well as the default: {cells}."
    if missing:
        yield f"Not in this folder, so not in this report: {', '.join(missing)}."
