"""Every setting of the frontier's sweeps."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_safeguard.evaluation.results.frontier import Setting
from vlm_safeguard.evaluation.statistics import Estimate
from vlm_safeguard.report.names import condition_name, number, percent
from vlm_safeguard.report.sheets.sheet import Cell, Sheet


def frontier_sheet(frontier: Sequence[Setting]) -> Sheet:
    """Attack success and over-refusal at every setting that was tried."""

    def cell(share: Estimate) -> Cell:
        interval = f"{percent(share.low)}–{percent(share.high)}, n = {share.n}"
        return Cell(f"{percent(share.value)} %", interval, share.value, share.value)

    return Sheet(
        name="frontier",
        title="Every setting of the sweeps",
        caption="Attack success against over-refusal as settings of the edit or the gate change, "
        "with 95 % intervals.",
        header=("knob", "setting", "images", "attack success", "over-refusal"),
        lines=tuple(
            (
                Cell(point.knob),
                Cell(number(point.setting), "", point.setting),
                Cell(condition_name(point.condition)),
                cell(point.attack_success),
                cell(point.over_refusal),
            )
            for point in frontier
        ),
        folded=True,
    )
