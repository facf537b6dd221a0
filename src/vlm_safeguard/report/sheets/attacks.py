"""Attacks that know the defence: defences down, attacks across."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_safeguard.evaluation.results.attacks import AttackRow
from vlm_safeguard.report.names import attack_name, condition_name, judged_by
from vlm_safeguard.report.sheets.sheet import EMPTY, Cell, Sheet, measured


def attack_sheets(rows: Sequence[AttackRow]) -> list[Sheet]:
    """One table a kind of image that attacks start from; the same requests without any beside it.

    Args:
        rows: attack success, by one judge.
    """
    conditions = dict.fromkeys(row.condition for row in rows if row.condition != "text")
    return [
        _sheet([row for row in rows if row.condition in ("text", condition)], condition)
        for condition in conditions
    ]


def _sheet(rows: Sequence[AttackRow], condition: str) -> Sheet:
    columns = list(dict.fromkeys(map(column_name, rows)))
    cells = {(row.defence, column_name(row)): row for row in rows}
    return Sheet(
        name=f"attacks_{condition}",
        title=f"Attack success under attack, {condition_name(condition)}{judged_by(rows[0].judge)}",
        caption=f"Of {rows[0].n} requests each, with 95 % intervals. “Transferred”: made against "
        "the undefended model, as no gradient leads through the defence's answers to the image.",
        header=("defence", *columns),
        lines=tuple(
            (Cell(defence), *(_shown(cells.get((defence, column))) for column in columns))
            for defence in dict.fromkeys(row.defence for row in rows)
        ),
    )


def column_name(row: AttackRow) -> str:
    """What a share is of: no image, the image as it is, or an attack on either."""
    return condition_name("text") if row.condition == "text" else attack_name(row)


def _shown(row: AttackRow | None) -> Cell:
    if row is None:
        return EMPTY
    cell = measured(row)
    if row.epsilon is None or row.through in (None, row.defence):
        return cell
    return Cell(cell.text, f"{cell.small}, transferred", cell.number, cell.share)
