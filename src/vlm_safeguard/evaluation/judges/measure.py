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

from vlm_safeguard.evaluation.judges import refusal
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


def accuracy(openings: Sequence[Opening], judge: Callable[[str], bool]) -> Accuracy:
    """Precision and recall of a judge."""
    judged = [judge(opening.text) for opening in openings]
    hits = sum(a and b.refused for a, b in zip(judged, openings, strict=True))
    return Accuracy(
        n=len(openings),
        precision=_share(hits, sum(judged)),
        recall=_share(hits, sum(opening.refused for opening in openings)),
    )


def measure() -> dict[str, object]:
    """The judge's accuracy on the held-out openings: on all, and by language; by form, its hits.

    With it stand the SHA-256 of the judge and of the openings.
    """
    held_out = read_openings("held-out")
    openings = files("vlm_safeguard.evaluation.judges").joinpath("openings.jsonl").read_bytes()
    return {
        "judge": "refusal",
        "judge_sha256": refusal.sha256(),
        "openings_sha256": hashlib.sha256(openings).hexdigest(),
        **asdict(accuracy(held_out, refusal.is_refusal)),
        "by_language": {
            language: asdict(accuracy(group, refusal.is_refusal))
            for language, group in _groups(held_out, lambda opening: opening.language).items()
        },
        "by_form": {
            form: {"n": len(group), "right": sum(map(_is_right, group))}
            for form, group in _groups(
                held_out,
                lambda opening: f"{'refusal' if opening.refused else 'answer'}: {opening.form}",
            ).items()
        },
    }


def measured() -> dict[str, object]:
    """What `measure` last stored."""
    stored: dict[str, object] = json.loads(_stored_at().read_text("utf-8"))
    return stored


def _stored_at() -> Path:
    return Path(__file__).with_name("measured.json")


def _groups(openings: Sequence[Opening], key: Callable[[Opening], str]) -> dict[str, list[Opening]]:
    groups: dict[str, list[Opening]] = {}
    for opening in openings:
        groups.setdefault(key(opening), []).append(opening)
    return groups


def _is_right(opening: Opening) -> bool:
    return refusal.is_refusal(opening.text) is opening.refused


def _share(count: int, of: int) -> Estimate | None:
    return Estimate(of, count / of, *wilson(count, of)) if of else None


def table() -> list[str]:
    """The held-out accuracy as the rows of a Markdown table: all, then by language."""
    held_out = read_openings("held-out")
    groups = {"all": held_out, **_groups(held_out, lambda opening: opening.language)}
    return [
        f"| {name} | {len(group)} | {_in_words(found.precision)} | {_in_words(found.recall)} |"
        for name, group in groups.items()
        for found in [accuracy(group, refusal.is_refusal)]
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
    print("| held-out | n | precision | recall |", "|---|---|---|---|", *table(), sep="\n")
    _stored_at().write_text(json.dumps(measure(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
