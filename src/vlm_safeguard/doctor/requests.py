"""Whether a request ends where the answer begins: what is begun for the model is not judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.doctor.subject import QUESTIONS, Subject, require
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.conversation import (
    encode_shown,
    noise_media,
    tokenizer_of,
    user_message,
)
from vlm_safeguard.model.generation_prompt import learn_generation_prompt

if TYPE_CHECKING:
    from transformers import BatchFeature

    from vlm_safeguard.engines.hooks.attachment import Attachment
    from vlm_safeguard.policy.receipt import Receipt

_BEGUN = "Sure, here is how"
_APPENDED, _CONTINUED = "tokens behind the prompt", "continue_final_message"


def requests_end_where_answers_begin(subject: Subject) -> str:
    """An answer that is begun moves no decision, and without a generation prompt there is none."""
    plain = _asked(subject)
    appended = tokenizer_of(subject.processor)(_BEGUN, add_special_tokens=False)["input_ids"]
    begun: dict[str, Mapping[str, Any]] = {_APPENDED: _longer(plain, appended)}
    with suppress(SafeguardError):  # a template for one turn only
        begun[_CONTINUED] = _asked(subject, _BEGUN)
    with subject.guard.attach(subject.model) as attachment:
        expected = _receipt(attachment, plain)
        for way, inputs in begun.items():
            receipt = _receipt(attachment, inputs)
            moved = _differences(receipt, expected, subject.tolerance)
            require(
                not moved,
                f"an answer begun by {way} is judged as a part of the request: {', '.join(moved)}",
            )
        _check_refused(attachment, _shorter(plain, subject))
    return f"an answer begun by {' or '.join(begun)} moves no score; a raw prompt is refused"


def _asked(subject: Subject, answer: str | None = None) -> BatchFeature:
    """The first question beside an image, and the answer as it is begun in the chat template."""
    messages, options = [user_message("image", QUESTIONS[0])], {}
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        options = {"add_generation_prompt": False, "continue_final_message": True}
    shown = noise_media(subject.processor, messages)
    batch = encode_shown(subject.processor, messages, shown, **options)
    return batch.to(subject.backbone.device, subject.model.dtype)


def _longer(inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """Inputs with more tokens behind; what else there is for each token is as for the last one."""
    ids = inputs["input_ids"]
    longer = {
        name: torch.cat([values, *[values[:, -1:]] * len(tokens)], dim=1)
        for name, values in _of_tokens(inputs).items()
    }
    longer["input_ids"] = torch.cat([ids, ids.new_tensor([tokens])], dim=1)
    return {**inputs, **longer}


def _shorter(inputs: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
    """Inputs without the chat template's generation prompt at their end."""
    row = inputs["input_ids"][0].tolist()
    forms = learn_generation_prompt(subject.processor).forms.values()
    length = max(len(form) for form in forms if tuple(row[-len(form) :]) == form)
    return {**inputs, **{name: x[:, :-length] for name, x in _of_tokens(inputs).items()}}


def _of_tokens(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What has an entry for each token of the prompt."""
    size = inputs["input_ids"].shape
    return {name: x for name, x in inputs.items() if getattr(x, "shape", ())[:2] == size}


def _receipt(attachment: Attachment, inputs: Mapping[str, Any]) -> Receipt:
    return attachment.generate(**inputs, max_new_tokens=1, do_sample=False).receipts[0]


def _differences(receipt: Receipt, expected: Receipt, tolerance: float) -> list[str]:
    """What of a decision is not as expected."""
    differences = [
        f"{name} {getattr(receipt, name)} instead of {getattr(expected, name)}"
        for name in ("guarded", "text_tokens")
        if getattr(receipt, name) != getattr(expected, name)
    ]
    for name, score in expected.scores.items():
        moved = receipt.scores.get(name, float("nan"))
        if not abs(moved - score) <= tolerance * max(1.0, abs(score)):
            differences.append(f"{name} {moved:+.3f} instead of {score:+.3f}")
    return differences if receipt.prefill_tokens else [*differences, "no token of it is noticed"]


def _check_refused(attachment: Attachment, raw: Mapping[str, Any]) -> None:
    try:
        _receipt(attachment, raw)
    except SafeguardError:
        return
    raise SafeguardError("a prompt without the chat template's generation prompt is answered")
