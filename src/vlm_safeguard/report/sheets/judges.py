"""How far the judges agree, and how often the judge `refusal` is right."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_safeguard.evaluation.judges.agreement import Agreement
from vlm_safeguard.evaluation.judges.measure import JudgeRecord
from vlm_safeguard.evaluation.statistics import Estimate
from vlm_safeguard.report.names import QUESTIONS, judge_name, percent
from vlm_safeguard.report.sheets.sheet import EMPTY, Cell, Sheet


def agreement_sheets(agreement: Sequence[Agreement]) -> list[Sheet]:
    """Cohen's κ of each pair of judges, and the confusion table of each."""
    if not agreement:
        return []
    overview = Sheet(
        name="agreement",
        title="Cohen's κ",
        caption="Agreement of judges on the same answers, corrected for chance: 1 is full "
        "agreement, 0 what chance gives. Left out: one of them could not be read.",
        header=("judges", "on", "κ", "n", "left out"),
        lines=tuple(
            (
                Cell(f"{judge_name(pair.judge_a)} and {judge_name(pair.judge_b)}"),
                Cell(QUESTIONS[pair.question]),
                EMPTY if pair.kappa is None else Cell(f"{pair.kappa:.2f}", "", pair.kappa),
                Cell(f"{pair.n:,}", "", float(pair.n)),
                Cell(f"{pair.left_out:,}", "", float(pair.left_out)),
            )
            for pair in agreement
        ),
    )
    return [overview, *map(_confusion, agreement)]


def refusal_judge_sheet(record: JudgeRecord) -> Sheet:
    """Precision and recall of the judge `refusal`, on all held-out openings and by language."""

    def share(of: Estimate | None) -> Cell:
        if of is None:
            return EMPTY
        interval = f"{percent(of.low)}–{percent(of.high)}"
        return Cell(f"{percent(of.value)} %", interval, of.value, of.value)

    return Sheet(
        name="refusal_judge",
        title=f"How often {judge_name('refusal')} are right",
        caption="On labelled openings of answers that the judge was not tuned on. Precision: of "
        "those that it calls refusals, the share that are; recall: of the refusals, the share that "
        f"it finds. SHA-256 of its phrases and verdicts: {record.judge_sha256[:12]}.",
        header=("openings", "n", "precision", "recall"),
        lines=tuple(
            (Cell(name), Cell(f"{of.n:,}", "", float(of.n)), share(of.precision), share(of.recall))
            for name, of in {"all": record.held_out, **record.by_language}.items()
        ),
    )


def _confusion(pair: Agreement) -> Sheet:
    a, b = judge_name(pair.judge_a), judge_name(pair.judge_b)
    total = max(1, pair.n)

    def count(number: int) -> Cell:
        return Cell(f"{number:,}", f"{percent(number / total)} %", float(number), number / total)

    words = ("failed", "succeeded") if pair.question == "succeeded" else ("not refused", "refused")
    return Sheet(
        name=f"confusion_{pair.question}_{pair.judge_a}_{pair.judge_b}",
        title=f"{a} and {b} on {QUESTIONS[pair.question]}",
        caption=f"By {a}: down; by {b}: across.",
        header=(f"by {a}", *(f"{word}, by {b}" for word in words)),
        lines=tuple(
            (Cell(word), *map(count, line)) for word, line in zip(words, pair.table, strict=True)
        ),
    )
