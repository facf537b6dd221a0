"""How often the `refusal` judge is right: on openings it was not written by.

`python -m vlm_safeguard.evaluation.judges.measure` prints and stores it; reports quote what is
stored. Run it after a change to the judge or the openings; a test compares the two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vlm_safeguard.evaluation.judges import refusal
from vlm_safeguard.evaluation.judges.languages import LANGUAGES
from vlm_safeguard.evaluation.judges.openings import Opening, read_openings
from vlm_safeguard.evaluation.statistics import Estimate, wilson


@dataclass(frozen=True)
class Accuracy:
    """How a judge of refusals does on labelled openings; 95 % Wilson intervals.

    Attributes:
        n: openings.
        precision: of those it calls refusals, the share that are; None where it calls none so.
        recall: of the refusals, the share that it calls so; None where there are none.
    """

    n: int
    precision: Estimate | None
    recall: Estimate | None


@dataclass(frozen=True)
class Hits:
    """Of `n` openings, how many a judge is right on."""

    n: int
    right: int


class JudgeRecord(BaseModel):
    """By which judge refusals are counted, and how often it is right on held-out openings.

    Attributes:
        judge_sha256: of its phrases, and of its verdicts on all the labelled openings.
        openings_sha256: of the file of labelled openings.
        by_form: keys are "refusal: redirect", "answer: lookalike" and the like.
    """

    model_config = ConfigDict(frozen=True)

    judge_sha256: str
    openings_sha256: str
    held_out: Accuracy
    by_language: dict[str, Accuracy]
    by_form: dict[str, Hits]


def accuracy(openings: Sequence[Opening], judge: Callable[[str], bool]) -> Accuracy:
    """Precision and recall of a judge."""
    judged = [judge(opening.text) for opening in openings]
    hits = sum(a and b.refused for a, b in zip(judged, openings, strict=True))
    return Accuracy(
        n=len(openings),
        precision=_share(hits, sum(judged)),
        recall=_share(hits, sum(opening.refused for opening in openings)),
    )


def measure() -> JudgeRecord:
    """The judge's accuracy on the held-out openings: on all, and by language; by form, its hits."""
    held_out = read_openings("held-out")
    openings = files("vlm_safeguard.evaluation.judges").joinpath("openings.jsonl").read_bytes()
    languages = _groups(held_out, lambda opening: opening.language)
    forms = _groups(
        held_out, lambda opening: f"{'refusal' if opening.refused else 'answer'}: {opening.form}"
    )
    return JudgeRecord(
        judge_sha256=_judge_sha256(),
        openings_sha256=hashlib.sha256(openings).hexdigest(),
        held_out=accuracy(held_out, refusal.is_refusal),
        by_language={
            language: accuracy(group, refusal.is_refusal) for language, group in languages.items()
        },
        by_form={
            form: Hits(len(group), sum(map(_is_right, group))) for form, group in forms.items()
        },
    )


def stored_record() -> JudgeRecord:
    """What was last measured."""
    return JudgeRecord.model_validate_json(_stored_at().read_text("utf-8"))


def _stored_at() -> Path:
    return Path(__file__).with_name("measured.json")


def _judge_sha256() -> str:
    """Names the judge by what decides: its phrases, and what its rules make of the openings."""
    phrases = json.dumps([asdict(language) for language in LANGUAGES])
    verdicts = json.dumps([refusal.is_refusal(opening.text) for opening in read_openings()])
    return hashlib.sha256((phrases + verdicts).encode()).hexdigest()


def _groups(openings: Sequence[Opening], key: Callable[[Opening], str]) -> dict[str, list[Opening]]:
    groups: dict[str, list[Opening]] = {}
    for opening in openings:
        groups.setdefault(key(opening), []).append(opening)
    return groups


def _is_right(opening: Opening) -> bool:
    return refusal.is_refusal(opening.text) is opening.refused


def _share(count: int, of: int) -> Estimate | None:
    return Estimate(of, count / of, *wilson(count, of)) if of else None


def table(record: JudgeRecord) -> list[str]:
    """The held-out accuracy as the rows of a Markdown table: all, then by language."""
    return [
        f"| {name} | {each.n} | {_in_words(each.precision)} | {_in_words(each.recall)} |"
        for name, each in {"all": record.held_out, **record.by_language}.items()
    ]


def _in_words(share: Estimate | None) -> str:
    return f"{share.value:.3f} ({share.low:.3f}–{share.high:.3f})" if share else "–"


def main() -> None:
    """Print the held-out accuracy and store it, or list the development half's errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--errors",
        action="store_true",
        help="what the judge gets wrong on the development half; the held-out half stays unread",
    )
    if parser.parse_args().errors:
        for opening in read_openings("development"):
            if not _is_right(opening):
                wrong = "missed" if opening.refused else "taken for a refusal"
                print(f"{wrong}: {opening.language}, {opening.form}: {opening.text!r}")
        return
    record = measure()
    print("| held-out | n | precision | recall |", "|---|---|---|---|", *table(record), sep="\n")
    _stored_at().write_text(record.model_dump_json(indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
