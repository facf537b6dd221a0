"""What the gate rests on: the model's own refusal, where that can be read."""

from __future__ import annotations

from vlm_safeguard.doctor.subject import Subject
from vlm_safeguard.model.conversation import tokenizer_of

_SHOWN = 5  # first tokens


def own_refusal_readable(subject: Subject) -> str:
    """Whether the gate asks the language model; never a failure, as a gate can do without."""
    policy = subject.guard.policy
    fitted = "" if subject.given is not None else "a small fit: "
    own = policy.own_refusal
    others = [criterion.name for criterion in policy.gate if criterion is not own]
    if own is None:
        return f"{fitted}no; the gate rests on {' and '.join(others)} alone"
    decode = tokenizer_of(subject.processor).decode
    tokens = ", ".join(repr(decode([token])) for token in own.tokens[:_SHOWN])
    more = f" and {len(own.tokens) - _SHOWN} more" if len(own.tokens) > _SHOWN else ""
    words = f"; most begin {decode(list(policy.refusal_prefix))!r}" if policy.refusal_prefix else ""
    if policy.other_prefixes:
        others_begin = ", ".join(repr(decode(list(prefix))) for prefix in policy.other_prefixes)
        words += f", in other languages {others_begin}"
    beside = f"; beside it {' and '.join(others)}" if others else ""
    return f"{fitted}yes, by its first token ({tokens}{more}){words}{beside}"
