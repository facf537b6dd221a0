"""Whether the edit `restore` gives what two passes by hand give."""

from __future__ import annotations

from vlm_safeguard.doctor.reference import restored_by_hand
from vlm_safeguard.doctor.subject import QUESTIONS, Subject, require
from vlm_safeguard.model.conversation import tokenizer_of
from vlm_safeguard.policy.edits import Restore
from vlm_safeguard.policy.gate import GATES
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span

_REFUSAL = "I'm sorry"  # an answer's opening that is edited, whatever the model would answer
_CLEAR = 3  # by how many times rounding the edit has to move the logits


def restore_equals_two_passes(subject: Subject) -> str:
    """`restore` gives the logits of two passes by hand, and moves them, at every token."""
    tokenizer = tokenizer_of(subject.processor)
    prefix = tuple(tokenizer(_REFUSAL, add_special_tokens=False).input_ids)
    guard = subject.guard.variant(
        gate=GATES["open"],
        edit=Restore(one_sided=False, span=Span.OPENING),
        response=Response.EDIT,
        refusal_prefix=prefix,
    )
    inputs = subject.inputs(QUESTIONS[:1], images=1)
    expected = restored_by_hand(subject, guard.policy, inputs)
    with guard.attach(subject.model):
        guarded = subject.logits_along(inputs, prefix)
    free = subject.logits_along(inputs, prefix)
    spread = float(expected.std())
    error = float((guarded - expected).abs().max()) / spread
    moved = float((free - expected).abs().amax((1, 2)).min()) / spread
    require(error <= subject.tolerance, f"logits differ by {error:.1e} of their spread")
    require(
        moved > _CLEAR * error,
        f"the edit moves the logits by {moved:.0e} of their spread, too little beside {error:.0e}",
    )
    return f"logits within {error:.0e} of their spread; the edit moves them by {moved:.0e}"
