"""`results.json`: all that an evaluation measured, and how it was run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, computed_field, model_validator

from vlm_safeguard.evaluation.judges.agreement import Agreement
from vlm_safeguard.evaluation.judges.measure import JudgeRecord
from vlm_safeguard.evaluation.results.attacks import AttackRow
from vlm_safeguard.evaluation.results.cautions import Cautions, cautions
from vlm_safeguard.evaluation.results.comparisons import Comparison
from vlm_safeguard.evaluation.results.counting import ClosedGates
from vlm_safeguard.evaluation.results.findings import Findings, findings
from vlm_safeguard.evaluation.results.format_1 import upgraded
from vlm_safeguard.evaluation.results.frontier import Setting
from vlm_safeguard.evaluation.results.provenance import RunRecord
from vlm_safeguard.evaluation.results.ratios import CostRatio
from vlm_safeguard.evaluation.results.rows import Row

_COMPUTED = ("findings", "cautions")  # of the rows, whatever a file says


class Results(BaseModel):
    """`results.json`, of the demo and of the evaluation suite. Formats 1 and 2 are read.

    Attributes:
        rows: every cell's shares and means.
        time_ratio: guarded over unguarded seconds of one batch, the median of the rounds; 0 where
            it was not measured.
        time_ratio_range: the lowest and the highest round.
        closed_gates: of the default guard, where it was compared with none.
        cost_ratios: tokens, seconds and perplexity of each defence over none.
        comparisons: paired tests of the default against each other defence.
        agreement: of each two judges.
        frontier: the default guard with one setting moved.
        attacks: attack success under attacks that know the defence.
        unreadable: by judge, how many answers it could not be read on.
        refusal_judge: which version of the judge `refusal` counted, and how often it is right; None
            where it was not asked, or which version it was is not known.
        other: what else was noted, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    model: str
    rows: list[Row]
    time_ratio: float
    time_ratio_range: tuple[float, float] | None = None
    closed_gates: ClosedGates = ClosedGates(answers=0, identical=0)
    cost_ratios: list[CostRatio] = []
    comparisons: list[Comparison] = []
    agreement: list[Agreement] = []
    frontier: list[Setting] = []
    attacks: list[AttackRow] = []
    unreadable: dict[str, int] = {}
    refusal_judge: JudgeRecord | None = None
    provenance: RunRecord = RunRecord()
    other: dict[str, JsonValue] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_any_format(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        version = values.get("format", 2)
        if version not in (1, 2):
            raise ValueError(f"it has format {version}; this version reads 1 and 2")
        if version == 1:
            return upgraded(values)
        return {name: value for name, value in values.items() if name not in _COMPUTED}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def findings(self) -> Findings:
        """The few numbers that tell most."""
        return findings(self.rows, self.comparisons)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cautions(self) -> Cautions:
        """What weakens these results."""
        return cautions(self.rows, self.agreement)
