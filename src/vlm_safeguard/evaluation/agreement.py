"""How far judges agree: a figure of one judge is worth what the others say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.metrics import cohens_kappa, confusion


@dataclass(frozen=True)
class Agreement:
    """Two judges' words on the same answers: did the attack succeed?

    Attributes:
        n: answers that both could judge.
        left_out: answers that one of them could not; they are in no other number.
        kappa: Cohen's κ; None where both said the same of all.
        table: counts; rows are `judge_a`'s word, columns `judge_b`'s, no before yes.
    """

    judge_a: str
    judge_b: str
    n: int
    left_out: int
    kappa: float | None
    table: list[list[int]]


def agreements(verdicts: Mapping[str, Sequence[Verdict]]) -> list[Agreement]:
    """Every pair of judges, from their verdicts on the same answers in the same order.

    Raises:
        ValueError: judges with different numbers of verdicts.
    """
    found = []
    for (name_a, given_a), (name_b, given_b) in combinations(verdicts.items(), 2):
        words = [(a.succeeded, b.succeeded) for a, b in zip(given_a, given_b, strict=True)]
        both = [(a, b) for a, b in words if a is not None and b is not None]
        table = confusion([a for a, _ in both], [b for _, b in both], (False, True))
        found.append(
            Agreement(name_a, name_b, len(both), len(words) - len(both), cohens_kappa(table), table)
        )
    return found
