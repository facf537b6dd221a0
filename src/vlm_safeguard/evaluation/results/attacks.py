"""Attack success under attacks that know the defence: the rows of `results.json` about them."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_safeguard.evaluation.asks.attempt import AttackName
from vlm_safeguard.evaluation.results.counting import rows
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.evaluation.results.rows import SHARES, Row


class AttackRow(Row):
    """A share of attacked requests.

    Attributes:
        condition: the image that the attack starts from; "text" for none.
        attack: by name; "none" for the same requests as they are.
        epsilon: levels of 255 by which a pixel may differ; None where none is changed.
        through: the defence that it was made through; "none" where it is transferred from the
            undefended model; None where nothing was optimised.
    """

    attack: AttackName
    epsilon: int | None
    through: str | None


def attack_shares(lines: Sequence[Line]) -> list[AttackRow]:
    """The shares of each attack's answers, cell by cell, in the order of the lines.

    Args:
        lines: of `attacked.jsonl`.
    """
    attacks: dict[tuple[AttackName, int | None, str | None], list[Line]] = {}
    for line in lines:
        if (attempt := line.attempt) is not None:
            key = (attempt.attack, attempt.epsilon, attempt.through)
            attacks.setdefault(key, []).append(line)
    return [
        AttackRow(**row.model_dump(), attack=attack, epsilon=epsilon, through=through)
        for (attack, epsilon, through), attacked in attacks.items()
        for row in rows(attacked)
        if row.metric in SHARES
    ]
