"""An examination: every check of a model, made in order and reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_safeguard.doctor.decoder import decoder_layers, hooks_act
from vlm_safeguard.doctor.doors import doors_shut
from vlm_safeguard.doctor.facts import facts_of
from vlm_safeguard.doctor.fit import guard_fits
from vlm_safeguard.doctor.gate import closed_gate_identical
from vlm_safeguard.doctor.refusal import own_refusal_readable
from vlm_safeguard.doctor.requests import requests_end_where_answers_begin
from vlm_safeguard.doctor.restoring import restore_equals_two_passes
from vlm_safeguard.doctor.subject import QUESTIONS, Subject, verified
from vlm_safeguard.doctor.text_answers import answers_from_the_text
from vlm_safeguard.doctor.text_view import text_only_view
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.wrappers import unwrapped
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.timing import Ratio, generation_ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

#: The checks by name, in order: each says in a line what it compared, or raises.
CHECKS: dict[str, Callable[[Subject], str]] = {
    "decoder layers": decoder_layers,
    "text-only view": text_only_view,
    "the guard fits": guard_fits,
    "hooks act": hooks_act,
    "requests end where answers begin": requests_end_where_answers_begin,
    "doors shut": doors_shut,
    "closed gate identical": closed_gate_identical,
    "answers from the text": answers_from_the_text,
    "restore equals two passes by hand": restore_equals_two_passes,
    "own refusal readable": own_refusal_readable,
}
_OF_GIVEN_GUARDS = ("the guard fits",)
_LONGEST = 300  # characters of an error that are shown


@dataclass(frozen=True)
class Check:
    """One check's outcome; `detail` says what was compared, or what went wrong."""

    name: str
    passed: bool
    detail: str


class Examination:
    """Of a model, verified family or not. Nothing in it is changed."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        given: Guard | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        """Of a model and its processor; nothing is run yet.

        Args:
            given: a fitted guard to check against the model, too; without one, a small one is
                fitted that shows whether one would work.
            tolerance: by how much logits may differ from the slow reference, relative to their
                spread.
        """
        self.subject = Subject(unwrapped(model), processor, given, tolerance)

    def run(self, report: Callable[[Check], None] = lambda check: None) -> list[Check]:
        """Make every check; `report` is called after each."""
        outcomes: list[Check] = []
        with verified(self.subject.model):
            for name, check in CHECKS.items():
                if name in _OF_GIVEN_GUARDS and self.subject.given is None:
                    continue
                outcomes.append(_outcome(name, check, self.subject))
                report(outcomes[-1])
        return outcomes

    def facts(self) -> dict[str, Any]:
        """What is examined, as plain values.

        Raises:
            SafeguardError: no decoder is found in the model.
        """
        with verified(self.subject.model):
            return facts_of(self.subject)

    def time_ratio(self) -> Ratio:
        """Guarded over unguarded seconds of a short answer, gate open, on this machine."""
        subject = self.subject
        with verified(subject.model):
            opened = subject.guard.variant(gate=GATES["open"])
            return generation_ratio(subject.model, subject.inputs(QUESTIONS, images=1), opened)


def _outcome(name: str, check: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, True, check(subject))
    except Exception as error:  # whatever a model, processor or guard raises is reported
        first = next(iter(str(error).strip().splitlines()), "")
        return Check(name, False, f"{type(error).__name__}: {first}"[:_LONGEST])
