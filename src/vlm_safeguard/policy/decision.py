"""The decision on a batch of requests: taken once, then only looked up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.criterion import Criterion
from vlm_safeguard.policy.reading import Reading

_ALONE = "of one of its sentences alone: "
_PASSES = {"text": "text-only pass", "image": "multimodal pass"}


class Finding(BaseModel):
    """What one criterion made of one request.

    Attributes:
        criterion: its name.
        opened: whether it opens the gate.
        measures: by name, what it measured and compared with: of the text whole or, where
            it does not open by that, of the sentence by which it does.
        sentence: what there is to say of it.
    """

    model_config = ConfigDict(frozen=True)

    criterion: str
    opened: bool
    measures: dict[str, float]
    sentence: str | None


@dataclass(frozen=True)
class Decision:
    """On n requests, so far.

    Attributes:
        is_open: (n, window) bool, on the CPU: the layers in which each request is edited.
        findings: of each request, a finding for each criterion that was asked.
        awaits_image: whether criteria that read the multimodal pass are still to be asked.
    """

    is_open: torch.Tensor
    findings: tuple[tuple[Finding, ...], ...]
    awaits_image: bool

    @property
    def may_open(self) -> bool:
        """Whether any request is open, or may yet be by its image."""
        return self.awaits_image or bool(self.is_open.any())

    def merged(self, other: Decision) -> Decision:
        """Open also where `other`, a later decision on the same requests, is; findings of both."""
        findings = zip(self.findings, other.findings, strict=True)
        return Decision(
            self.is_open | other.is_open,
            tuple((*mine, *more) for mine, more in findings),
            other.awaits_image,
        )


def decide(
    gate: Iterable[Criterion],
    reads: str,
    requests: Sequence[Sequence[int]],
    reading: Reading | None,
    window: int,
) -> Decision:
    """Ask the criteria that read one kind of pass.

    Args:
        reads: that kind, as `Criterion.reads` names it.
        requests: of each request, its rows in `reading`, any of which opens it: its text's, then
            those of its sentences. One without rows is not decided on, and stays closed.
        reading: the pass; None where the criteria read nothing.
        window: how many layers are edited.

    Raises:
        SafeguardError: a score is not a number.
    """
    is_open = torch.zeros(len(requests), window, dtype=torch.bool)
    findings: list[tuple[Finding, ...]] = [()] * len(requests)
    asked = [number for number, rows in enumerate(requests) if rows]
    for criterion in gate:
        if criterion.reads != reads or not asked:
            continue
        score = torch.zeros(1, 0) if reading is None else criterion.score(reading).cpu()
        if not torch.isfinite(score[[row for rows in requests for row in rows]]).all():
            raise SafeguardError(
                f"The {_PASSES[reads]} gave a score that is not a number ({criterion.name}); "
                "the request cannot be judged, so nothing is generated."
            )
        opens, opens_alone = criterion.opens(score, window), criterion.opens_alone(score, window)
        for number in asked:
            text, *sentences = requests[number]
            is_open[number] |= opens[text] | opens_alone[sentences].any(0)
            opening = [text] if opens[text].any() else []
            opening += [row for row in sentences if opens_alone[row].any()]
            row = opening[0] if opening else text
            alone = row != text
            values = score[row].tolist()
            said = criterion.says(values, bool(opening))
            finding = Finding(
                criterion=criterion.name,
                opened=bool(opening),
                measures=criterion.shown_alone(values) if alone else criterion.shown(values),
                sentence=f"{_ALONE}{said}" if said and alone else said,
            )
            findings[number] = (*findings[number], finding)
    awaits = reads != "image" and any(criterion.reads == "image" for criterion in gate)
    return Decision(is_open, tuple(findings), awaits)
