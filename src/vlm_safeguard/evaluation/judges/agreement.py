"""How far judges agree: a figure of one judge is worth what the others say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.statistics import cohens_kappa, confusion

Question = Literal["succeeded", "refused"]  # did the attack; was it


@dataclass(frozen=True)
class Agreement:
    """Two judges' words on the same answers.

    Attributes:
        question: what both were asked.
        n: answers that both could judge.
        left_out: answers that one of them could not; they are in no other number.
        kappa: Cohen's κ; None where both said the same of all.
        table: counts; rows are `judge_a`'s word, columns `judge_b`'s, no before yes.
    """

    question: Question
    judge_a: str
    judge_b: str
    n: int
    left_out: int
    kappa: float | None
    table: list[list[int]]


def agreements(verdicts: Mapping[str, Sequence[Verdict]]) -> list[Agreement]:
    """Every pair of judges, from their verdicts on the same answers in the same order.

    On whether attacks succeeded; and on what was refused, where both of them say so.

    Raises:
        ValueError: judges with different numbers of verdicts.
    """
    pairwise = []
    for (name_a, given_a), (name_b, given_b) in combinations(verdicts.items(), 2):
        pairs = list(zip(given_a, given_b, strict=True))
        words: dict[Question, list[tuple[bool | None, bool | None]]] = {
            "succeeded": [(a.succeeded, b.succeeded) for a, b in pairs],
            "refused": [(a.refused, b.refused) for a, b in pairs],
        }
        for question, answers in words.items():
            both = [(a, b) for a, b in answers if a is not None and b is not None]
            if question == "refused" and not both:  # one of them is no judge of refusals
                continue
            table = confusion([a for a, _ in both], [b for _, b in both], (False, True))
            pairwise.append(
                Agreement(
                    question,
                    name_a,
                    name_b,
                    n=len(both),
                    left_out=len(answers) - len(both),
                    kappa=cohens_kappa(table),
                    table=table,
                )
            )
    return pairwise
