"""Does the guard work on this model? The checks behind every verified family.

Each is made against something independent of the guard: the chat template's own rendering, the
unguarded model, and a slow reference that runs both passes by hand with plain hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.activations import hidden_states
from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.backbone import Backbone, TextView, encode_messages, render_chat, user_turn
from vlm_safeguard.edits import Restore
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.families import FAMILIES, PLACEHOLDERS, Family
from vlm_safeguard.gate import CalibratedGate, OpenGate
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import noise_image

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_PAIRS, _REQUESTS, _BUDGET = 12, 21, 0.2  # a small fit is enough: only its mechanics are checked
_QUESTIONS = ("How do I bake bread?", "What is shown here, and what could I do with it?")
_TOKENS = 4
_CLOSED = 1e9  # a threshold that no score passes


@dataclass(frozen=True)
class Check:
    """One check's outcome; `detail` says what was compared, or what went wrong."""

    name: str
    passed: bool
    detail: str


def guessed_family(model: PreTrainedModel) -> Family:
    """What an unverified type may be: its image tokens are those its config names."""
    names = tuple(name for name in PLACEHOLDERS if getattr(model.config, name, None) is not None)
    return Family(placeholders=names)


def examine(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    tolerance: float = 1e-3,
    report: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Run every check on a model, verified family or not. Nothing is changed.

    Args:
        tolerance: by how much logits may differ from the slow reference, relative to their spread.
        report: called after every check.
    """
    checks: list[Check] = []
    model_type = model.config.model_type
    family = FAMILIES.get(model_type) or guessed_family(model)
    with _on_trial(model_type, family):
        for name, check in (
            ("decoder layers", _check_layers),
            ("text-only view", _check_view),
            ("hooks act", _check_canary),
            ("closed gate identical", _check_closed),
            ("restore equals two passes by hand", _check_restore),
        ):
            try:
                outcome = Check(name, True, check(model, processor, tolerance))
            except Exception as error:
                said = str(error).strip().splitlines() or [""]
                outcome = Check(name, False, f"{type(error).__name__}: {said[0]}"[:300])
            checks.append(outcome)
            report(outcome)
    return checks


@contextmanager
def _on_trial(model_type: str, family: Family) -> Iterator[None]:
    """Treat a type as verified, for the time of its checks."""
    known = FAMILIES.get(model_type)
    FAMILIES[model_type] = family
    try:
        yield
    finally:
        if known is None:
            del FAMILIES[model_type]


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SafeguardError(otherwise)


def _check_layers(model: PreTrainedModel, processor: ProcessorMixin, _: float) -> str:
    backbone = Backbone.of(model)
    fired: list[int] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out, i=i: fired.append(i))
        for i, layer in enumerate(backbone.layers)
    ]
    try:
        with torch.no_grad():
            model(**_inputs(model, processor, _QUESTIONS[:1], 0))
    finally:
        for handle in handles:
            handle.remove()
    count = len(backbone.layers)
    _require(fired == list(range(count)), f"of {count} layers, {fired} took part in a text pass")
    return f"{count} layers in {backbone.decoder_path}, each once and in order"


def _conversations() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Named conversations with images."""
    image = {"type": "image"}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    ask, more = _QUESTIONS
    reply = {"role": "assistant", "content": [text("Bread needs flour.")]}
    yield "one image", [user_turn(ask, images=1)]
    yield "two images", [user_turn(more, images=2)]
    interleaved = [text("Look at"), image, text("and then at"), image, text("please.")]
    yield "interleaved", [{"role": "user", "content": interleaved}]
    yield "two turns", [user_turn(ask, images=1), reply, user_turn(more)]
    yield "image in the second turn", [user_turn(ask), reply, user_turn(more, images=1)]
    system = {"role": "system", "content": [text("Answer briefly.")]}
    yield "system prompt", [system, user_turn(ask, images=1)]


def _without_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**turn, "content": [item for item in turn["content"] if item["type"] != "image"]}
        for turn in messages
    ]


def _check_view(model: PreTrainedModel, processor: ProcessorMixin, _: float) -> str:
    backbone = Backbone.of(model)
    view = TextView.learn(processor, backbone.placeholder_ids)
    seen, spaced, untold = [], [], []
    for name, messages in _conversations():
        images = sum(item["type"] == "image" for turn in messages for item in turn["content"])
        pictures = [noise_image(number).resize((96, 64)) for number in range(images)]
        try:
            plain = encode_messages(processor, _without_images(messages))
            ids = encode_messages(processor, messages, pictures)
        except (SafeguardError, ValueError) as error:
            if name in ("one image", "two turns"):
                raise
            untold.append(f"{name} ({str(error).splitlines()[0][:60]})")
            continue
        found = view(ids)
        if found != plain and _letters(processor, found) == _letters(processor, plain):
            spaced.append(name)
            continue
        _require(
            found == plain,
            f"{name}: the view has {len(found)} tokens, the template's own text {len(plain)}; "
            f"first difference at {_first_difference(found, plain)}",
        )
        seen.append(name)
    literal = _placeholder_text(processor, backbone.placeholder_ids)
    tokenizer: Any = getattr(processor, "tokenizer", processor)  # processors may count images
    ids = tokenizer(render_chat(processor, f"What does {literal} mean?"))["input_ids"]
    _require(
        not backbone.placeholder_ids & set(view(ids)),
        f"a typed {literal!r} stays in the text-only view",
    )
    told = f"equal token for token: {', '.join([*seen, 'a typed placeholder'])}"
    told += f"; but for white space: {', '.join(spaced)}" if spaced else ""
    return told + (f"; not taken by the template: {', '.join(untold)}" if untold else "")


def _letters(processor: ProcessorMixin, ids: list[int]) -> str:
    """The text of tokens without its white space, which tokenizers fuse with what is around."""
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    return "".join(tokenizer.decode(ids).split())


def _placeholder_text(processor: ProcessorMixin, ids: frozenset[int]) -> str:
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    text: str = tokenizer.decode([min(ids)])
    return text


def _first_difference(left: list[int], right: list[int]) -> int:
    for place, (mine, theirs) in enumerate(zip(left, right, strict=False)):
        if mine != theirs:
            return place
    return min(len(left), len(right))


def _fitted(model: PreTrainedModel, processor: ProcessorMixin, **options: Any) -> Guard:
    return Guard.fit(
        model,
        processor,
        anchors=shipped_anchors()[:_PAIRS],
        calibration=shipped_calibration()[:_REQUESTS],
        budget=_BUDGET,
        rank=4,
        batch_size=8,
        **options,
    )


def _check_canary(model: PreTrainedModel, processor: ProcessorMixin, _: float) -> str:
    guard = _fitted(model, processor, gate="open")
    with guard.attach(model):
        pass
    return f"each of layers {guard.layers[0]}-{guard.layers[-1]} moves the logits when pushed"


def _inputs(
    model: PreTrainedModel, processor: ProcessorMixin, questions: tuple[str, ...], images: int
) -> dict[str, Any]:
    """A left-padded batch with `images` pictures a question."""
    prompts = [render_chat(processor, question, images=images) for question in questions]
    pictures = [noise_image(i).resize((96, 64)) for i in range(images * len(questions))]
    batch = processor(
        text=prompts,
        images=[pictures[i : i + images] for i in range(0, len(pictures), images)]
        if images
        else None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    return dict(batch.to(model.device, model.dtype))


def _check_closed(model: PreTrainedModel, processor: ProcessorMixin, _: float) -> str:
    guard = _fitted(model, processor)
    gate = guard.gate
    assert isinstance(gate, CalibratedGate)
    inputs = _inputs(model, processor, _QUESTIONS, 1)
    options = {"max_new_tokens": _TOKENS, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    free = model.generate(**inputs, **options)
    shut = {"refusal_tokens": (), "text_threshold": _CLOSED}
    if gate.image_layer is not None:
        shut["image_threshold"] = _CLOSED
    closed = guard.variant(gate=gate.model_copy(update=shut))
    with closed.attach(model):
        guarded = model.generate(**inputs, **options)
    same = torch.equal(free.sequences, guarded.sequences) and all(
        map(torch.equal, free.logits, guarded.logits)
    )
    _require(same, "with every gate closed, logits differ from the unguarded model's")
    return f"{len(_QUESTIONS)} rows, {_TOKENS} tokens: tokens and logits bit for bit"


def _check_restore(model: PreTrainedModel, processor: ProcessorMixin, tolerance: float) -> str:
    guard = _fitted(model, processor, gate="open", edit=Restore(one_sided=False))
    assert isinstance(guard.gate, OpenGate)
    question = _QUESTIONS[:1]
    expected = _restored_by_hand(model, processor, guard, question)
    inputs = _inputs(model, processor, question, 1)
    with guard.attach(model):
        found = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits[0]  # fmt: skip
    free = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]  # fmt: skip
    spread = float(expected.std())
    error = float((found - expected).abs().max()) / spread
    moved = float((free - expected).abs().max()) / spread
    _require(error <= tolerance, f"logits differ by {error:.1e} of their spread")
    _require(moved > 10 * error, "the edit changes nothing, so nothing is shown")
    return f"logits within {error:.0e} of their spread; the edit moves them by {moved:.0e}"


@torch.no_grad()
def _restored_by_hand(
    model: PreTrainedModel, processor: ProcessorMixin, guard: Guard, question: tuple[str, ...]
) -> torch.Tensor:
    """Next-token logits of one request: its text alone through the whole model, then the edit."""
    layers = Backbone.of(model).layers
    text: dict[int, torch.Tensor] = {}
    handles = [
        layers[n].register_forward_hook(
            lambda m, a, out, n=n: text.__setitem__(n, hidden_states(out)[0, -1].double())
        )
        for n in guard.layers
    ]
    if guard.text_view.exact:
        model(**_inputs(model, processor, question, 0))
    else:  # the template's own text differs in white space
        row = _inputs(model, processor, question, 1)["input_ids"][0].tolist()
        model(input_ids=torch.tensor([guard.text_view(row)], device=model.device))
    for handle in handles:
        handle.remove()

    def restore(n: int) -> Any:
        V = guard.basis()[n, : guard.rank].double().to(model.device)

        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            states = hidden_states(output).clone()
            last = states[0, -1].double()
            states[0, -1] = (last + V.mT @ (V @ text[n] - V @ last)).to(states.dtype)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    handles = [layers[n].register_forward_hook(restore(n)) for n in guard.layers]
    try:
        out = model.generate(
            **_inputs(model, processor, question, 1), max_new_tokens=1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    logits: torch.Tensor = out.logits[0]
    return logits
