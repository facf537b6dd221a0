"""The decision on a batch of requests: taken once, then only looked up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from pydantic import BaseModel, ConfigDict

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.criterion import Criterion
from vlm_safeguard.policy.reading import Reading

_PASSES = {"text": "text-only pass", "image": "multimodal pass"}


class Finding(BaseModel):
    """What one criterion made of one request.

    Attributes:
        criterion: its name.
        opened: whether it opens the gate.
        measures: by name, what it measured and compared with.
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
    requests: Sequence[int | None],
    reading: Reading | None,
    window: int,
) -> Decision:
    """Ask the criteria that read one kind of pass.

    Args:
        reads: that kind, as `Criterion.reads` names it.
        requests: of each request, its row in `reading`; None for one that is not to be decided on,
            which stays closed.
        reading: the pass; None where the criteria read nothing.
        window: how many layers are edited.

    Raises:
        SafeguardError: a score is not a number.
    """
    is_open = torch.zeros(len(requests), window, dtype=torch.bool)
    findings: list[tuple[Finding, ...]] = [()] * len(requests)
    asked = [i for i, row in enumerate(requests) if row is not None]
    rows = torch.tensor([row for row in requests if row is not None], dtype=torch.long)
    for criterion in gate:
        if criterion.reads != reads or not asked:
            continue
        if reading is None:
            score = torch.zeros(len(asked), 0)
        else:
            score = criterion.score(reading).cpu()[rows]
        opens = criterion.opens(score, window)
        is_open[asked] |= opens
        for request, values, opened in zip(
            asked, score.tolist(), opens.any(1).tolist(), strict=True
        ):
            if not all(map(isfinite, values)):
                raise SafeguardError(
                    f"The {_PASSES[reads]} gave a score that is not a number ({criterion.name}); "
                    "the request cannot be judged, so nothing is generated."
                )
            finding = Finding(
                criterion=criterion.name,
                opened=opened,
                measures=criterion.shown(values),
                sentence=criterion.says(values, opened),
            )
            findings[request] = (*findings[request], finding)
    awaits = reads != "image" and any(criterion.reads == "image" for criterion in gate)
    return Decision(is_open, tuple(findings), awaits)
