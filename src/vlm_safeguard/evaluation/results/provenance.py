"""How an evaluation was run: the provenance in `results.json`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue


class RunRecord(BaseModel):
    """What one needs to run an evaluation again.

    Attributes:
        command: what was typed.
        started: the date and time, in UTC, as ISO 8601 writes it.
        seconds: that the run took; of a run that was resumed, its last part.
        seed: draws the samples.
        versions: of the packages that decide, by name.
        machine: the system, its cores and the device.
        plan: the evaluation's plan, whole.
    """

    model_config = ConfigDict(frozen=True)

    command: str = ""
    started: str | None = None
    seconds: float | None = None
    seed: int | None = None
    versions: dict[str, str] = {}
    machine: dict[str, str | int | None] = {}
    plan: dict[str, JsonValue] = {}
