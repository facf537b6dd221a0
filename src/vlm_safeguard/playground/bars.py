"""What the gate's criteria measured, as bars against what they have to be above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_safeguard.policy.criterion import Criterion
from vlm_safeguard.policy.decision import Finding
from vlm_safeguard.policy.gate import PaperSign, Thresholded
from vlm_safeguard.policy.own_refusal import RefusalWords, ScoredRefusal
from vlm_safeguard.policy.policy import Policy

_ANCHORS = "−1 is the harmless anchors' mean, +1 the harmful ones'"
#: A measure's name → what it is, and how to read its number.
_WORDS = {
    "own_refusal": (
        "The language model's own refusal",
        "asked by the text alone: logits by which a refusal's first token leads",
    ),
    "own_opening": (
        "… in its usual words",
        "logits by which these are likelier than others; read where that decides",
    ),
    "text_score": ("The text's harm score", _ANCHORS),
    "discriminant": ("The text's score under the discriminant", "fitted on anchors of many forms"),
    "image_score": ("The harm score with the image", _ANCHORS),
    "open_layers": ("The paper's gate", "share of the edited layers in which it is open"),
}
_MARGIN = 1.1  # of the widest number, so that no bar ends at the edge


@dataclass(frozen=True)
class Bar:
    """One measure on a line that has zero in its middle; places are per cent of its length.

    Attributes:
        label: what was measured.
        hint: how to read the number.
        value: as measured.
        limit: what it has to be above.
        passes: whether it is.
        start: where the bar begins: at zero, or at a value below it.
        length: of the bar.
        mark: where the limit stands.
    """

    label: str
    hint: str
    value: float
    limit: float
    passes: bool
    start: float
    length: float
    mark: float


def bars(policy: Policy, findings: Sequence[Finding]) -> list[Bar]:
    """A bar for each measure that has a limit, in the gate's order.

    Args:
        policy: whose gate gave the findings.
    """
    criteria: dict[str, Criterion] = {criterion.name: criterion for criterion in policy.gate}
    return [bar for finding in findings for bar in _bars(criteria[finding.criterion], finding)]


def limits(criterion: Criterion) -> dict[str, float]:
    """What each of a criterion's measures has to be above to speak for harm."""
    match criterion:
        case ScoredRefusal() | RefusalWords():
            return {"own_refusal": 0.0, "own_opening": -criterion.slack}
        case Thresholded():
            return dict.fromkeys(criterion.measures, criterion.threshold)
        case PaperSign():
            return {"open_layers": 0.0}
        case _:
            return {}


def _bars(criterion: Criterion, finding: Finding) -> list[Bar]:
    return [
        _bar(name, finding.measures[name], limit)
        for name, limit in limits(criterion).items()
        if name in finding.measures
    ]


def _bar(name: str, value: float, limit: float) -> Bar:
    label, hint = _WORDS.get(name, (name.replace("_", " ").capitalize(), ""))
    reach = _MARGIN * max(1.0, abs(value), abs(limit))

    def place(number: float) -> float:
        return round(50 + 50 * number / reach, 2)

    return Bar(
        label=label,
        hint=hint,
        value=value,
        limit=limit,
        passes=value > limit,
        start=min(place(value), 50.0),
        length=round(abs(place(value) - 50), 2),
        mark=place(limit),
    )
