"""The family of edits: h* = h + λ Vᵀ (z_ref − V h), one class for each choice of reference z_ref.

V (m × d) has orthonormal rows, V h are the coordinates of a state h in the safety subspace, and
the gate decides which requests are edited at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.span import Span


@dataclass(frozen=True)
class Reference:
    """What an edit may aim at in one layer, in the coordinates of its safety subspace.

    Attributes:
        text: (states, m) V h(q), the coordinates of the same tokens in the text-only pass; None
            where it was not run.
        harmful: (states, m) or (m,) what the harm coordinate is raised to: the harmful anchors'
            mean at a prompt's last token, where that was measured; `text` at other ones.
        drift: (m,) mean shift of coordinates that a blank image causes; None where not measured.
    """

    text: torch.Tensor | None
    harmful: torch.Tensor
    drift: torch.Tensor | None = None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Edit(ABC):
    """One member of the family.

    Attributes:
        strength: λ; negative values push the other way.
        span: which tokens are edited.
    """

    strength: float = 1.0
    span: Span = Span.LAST

    name: ClassVar[str]
    needs_text: ClassVar[bool] = True  # the reference is taken from the text-only pass
    needs_drift: ClassVar[bool] = False
    edits_text: ClassVar[bool] = False  # acts on a request that has no image, too

    def __post_init__(self) -> None:
        if not isinstance(self.span, Span):
            raise SafeguardError(f"An edit's span is a Span, e.g. Span.LAST, not {self.span!r}.")

    @abstractmethod
    def reference(self, z: torch.Tensor, at: Reference) -> torch.Tensor:
        """z_ref (states, m), from the current coordinates z (states, m)."""

    def __call__(self, h: torch.Tensor, V: torch.Tensor, at: Reference) -> torch.Tensor:
        """The edited states.

        Args:
            h: (states, hidden), any floating dtype; the result has the same.
            V: (m, hidden) orthonormal rows, float32, or float64 where h is.
            at: what to aim at, in V's dtype.
        """
        states = h.to(V.dtype)
        return (states + self.shift(states @ V.mT, at) @ V).to(h.dtype)

    def shift(self, z: torch.Tensor, at: Reference) -> torch.Tensor:
        """λ (z_ref − z), (states, m): by how much the coordinates z (states, m) are moved."""
        return self.strength * (self.reference(z, at) - z)

    def to_config(self) -> dict[str, Any]:
        """The name and the parameters, as they stand in a guard's config."""
        return {"name": self.name, **asdict(self), "span": str(self.span)}


def _text(at: Reference) -> torch.Tensor:
    assert at.text is not None, "the text-only pass was not run"
    return at.text


def _one_sided(z_ref: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """`z_ref` with its first (harm) coordinate raised to `floor` where it is lower."""
    first = torch.maximum(z_ref[:, :1], floor)
    return torch.cat([first, z_ref[:, 1:]], dim=1)


@dataclass(frozen=True)
class Restore(Edit):
    """Put back the LLM's own coordinates: z_ref = V h(q).

    The paper's two steps with α = 1, (I − P) h(Q) + P h(q); with m = 1 also ShiftDC (arXiv
    2502.13095).

    Attributes:
        one_sided: never lower the harm coordinate. Where the image carries the harm, the text
            alone looks harmless, and putting its coordinate back would hide the harm.
    """

    span: Span = Span.OPENING
    one_sided: bool = True

    name: ClassVar[str] = "restore"

    def reference(self, z: torch.Tensor, at: Reference) -> torch.Tensor:
        """V h(q), its first coordinate at least the current one where one-sided."""
        text = _text(at)
        return _one_sided(text, z[:, :1]) if self.one_sided else text


@dataclass(frozen=True)
class Refuse(Edit):
    """Raise the harm coordinate to at least the harmful anchors' mean; restore the others.

    z_ref,1 = max(z_1, V_1 h(q), mean of the harmful anchors). The paper's shift along the SSD;
    behind a gate also ACE with α = 1 (arXiv 2411.09003).
    """

    span: Span = Span.OPENING

    name: ClassVar[str] = "refuse"

    def reference(self, z: torch.Tensor, at: Reference) -> torch.Tensor:
        """V h(q), its first coordinate at least the current and the harmful anchors' one."""
        return _one_sided(_text(at), torch.maximum(z[:, :1], at.harmful[..., :1]))


@dataclass(frozen=True)
class Project(Edit):
    """The literal projection out of the subspace: z_ref = 0, h* = h − P h.

    Also the ablation of Arditi et al. (arXiv 2406.11717), which removes refusal: a negative
    control, never a default.
    """

    name: ClassVar[str] = "project"
    needs_text: ClassVar[bool] = False
    edits_text: ClassVar[bool] = True

    def reference(self, z: torch.Tensor, at: Reference) -> torch.Tensor:
        """Zero."""
        return torch.zeros_like(z)


@dataclass(frozen=True)
class Drift(Edit):
    """Take back the mean shift that a blank image causes: z_ref = z − V·mean[h(x, blank) − h(x)].

    CMRM (arXiv 2410.09047) inside the subspace. Needs no second pass.
    """

    name: ClassVar[str] = "drift"
    needs_text: ClassVar[bool] = False
    needs_drift: ClassVar[bool] = True

    def reference(self, z: torch.Tensor, at: Reference) -> torch.Tensor:
        """The current coordinates less the measured drift."""
        assert at.drift is not None, "the drift was not measured"
        return z - at.drift


@dataclass(frozen=True)
class Add(Edit):
    """The paper's alignment equation taken literally: z_ref = z + V h(q), λ = α.

    h* = h(Q) + α P h(q), without projecting first.
    """

    name: ClassVar[str] = "add"
    edits_text: ClassVar[bool] = True

    def reference(self, z: torch.Tensor, at: Reference) -> torch.Tensor:
        """The current coordinates plus the text-only ones."""
        return z + _text(at)


EDITS: dict[str, type[Edit]] = {edit.name: edit for edit in (Restore, Refuse, Project, Drift, Add)}


def edit_from_config(config: dict[str, Any]) -> Edit:
    """The edit that `Edit.to_config` described.

    Raises:
        SafeguardError: no such edit, or parameters it does not have.
    """
    parameters = dict(config)
    name = parameters.pop("name", None)
    if name not in EDITS:
        raise SafeguardError(f"There is no edit '{name}'; there are {', '.join(EDITS)}.")
    if "span" in parameters:
        try:
            parameters["span"] = Span.named(parameters["span"])
        except ValueError as error:
            raise SafeguardError(f"The edit '{name}' cannot be read: {error}.") from error
    try:
        return TypeAdapter(EDITS[name]).validate_python(parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SafeguardError(f"The edit '{name}' does not take {where}: {first['msg']}.") from error
