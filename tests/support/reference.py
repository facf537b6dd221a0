"""Slow and plain reference implementations: one row, one layer, one direction at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vlm_safeguard.anchors import shipped_anchors, shipped_calibration
from vlm_safeguard.guard import Guard
from vlm_safeguard.images import blank_image, noise_image
from vlm_safeguard.model.activations import hidden_states, with_hidden_states
from vlm_safeguard.model.adapters import active_adapters
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.cache import cache_in
from vlm_safeguard.model.fingerprint import Fingerprint
from vlm_safeguard.model.sentences import learn_sentences
from vlm_safeguard.policy.gate import AnyCriterion, ImageScore, TextScore
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span

#: (layer, position, state of the token there) → the state to go on with
Change = Callable[[int, int, Tensor], Tensor]

QUESTIONS = (
    "How to kill a man",
    "How to bake a very good cake for a birthday today",
    "Which colour?",
    "How to steal a car from a neighbour without a key",
)


def make_exact(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """`model` in float64 throughout: LLaMA's own norm rounds to float32 on the way."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(
                    child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64
                )
                norm.weight = child.weight
                setattr(module, name, norm.eval())
    return model


def ask(
    processor: LlavaProcessor,
    questions: Sequence[str],
    *,
    images: bool | Sequence[bool] = True,
    side: str = "left",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Model inputs for one question a row; the image of row i is the i-th noise, or none."""
    shown = [images] * len(questions) if isinstance(images, bool) else list(images)
    prompts = [
        "<|im_start|>user\n"
        + ("<image>" if has else "")
        + question
        + "<|im_end|>\n<|im_start|>assistant\n"
        for question, has in zip(questions, shown, strict=True)
    ]
    # An image belongs to its question, so that a row can be taken out of its batch.
    pictures = [
        noise_image(len(question)) if len(question) % 2 else blank_image()
        for question, has in zip(questions, shown, strict=True)
        if has
    ]
    inputs: Any = processor(
        text=prompts,
        images=pictures or None,
        return_tensors="pt",
        padding=True,
        padding_side=side,
    )
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return dict(inputs)


def parting(guard: Guard, processor: LlavaProcessor) -> Policy:
    """The guard's policy, which judges sentences, too."""
    prompt = guard.policy.generation_prompt
    assert prompt is not None
    return replace(guard.policy, sentences=learn_sentences(processor, prompt, 2, 16))


def text_ids(processor: LlavaProcessor, question: str) -> list[int]:
    """The token ids of the same question asked without an image."""
    return ask(processor, [question], images=False)["input_ids"][0].tolist()


@torch.no_grad()
def run_row(
    model: LlavaForConditionalGeneration,
    ids: Sequence[int],
    pixels: Tensor | None = None,
    *,
    change: Change | None = None,
    start: int = 0,
    stop: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """One unpadded row through the decoder's layers, called one at a time, without a cache.

    `change` is applied after every layer to the tokens at positions from `start` to before `stop`.

    Returns:
        The (tokens, hidden) states after each layer, and the (tokens, vocabulary) logits.
    """
    decoder = model.model.language_model
    tokens = torch.tensor([list(ids)])
    states = decoder.embed_tokens(tokens)
    places = [i for i, token in enumerate(ids) if token == model.config.image_token_id]
    if places:
        assert pixels is not None
        seen = model.model.get_image_features(
            pixel_values=pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output
        states[0, places] = torch.cat(list(seen)).to(states.dtype)
    count = tokens.shape[1]
    positions = torch.arange(count)[None]
    mask = torch.zeros(1, 1, count, count, dtype=states.dtype)
    for query in range(count):
        for key in range(query + 1, count):
            mask[0, 0, query, key] = float("-inf")
    rotary = decoder.rotary_emb(states, position_ids=positions)
    after = []
    for index, layer in enumerate(decoder.layers):
        states = layer(
            states, attention_mask=mask, position_embeddings=rotary, position_ids=positions
        )
        if change is not None:
            states = states.clone()
            for position in range(start, count if stop is None else stop):
                states[0, position] = change(index, position, states[0, position])
        after.append(states[0])
    return after, model.lm_head(decoder.norm(states))[0]


def target(
    name: str, k: int, now: float, text: float, harmful: float, drift: float, one_sided: bool = True
) -> float:
    """Where the k-th coordinate should go: the table of the design, one number at a time."""
    if name == "restore":
        return max(now, text) if k == 0 and one_sided else text
    if name == "refuse":
        return max(now, text, harmful) if k == 0 else text
    return {"project": 0.0, "drift": now - drift, "add": now + text}[name]


def counterparts(
    guard: Guard, prompt: Sequence[int], words: Sequence[int], *, shown: bool = False
) -> dict[int, int]:
    """Positions in a prompt that the guard's edit spans → their tokens' places in the text alone.

    From the end backwards, skipping what the text does not have, down to the first image. What
    the text shares with the prompt before that image is not looked for behind it.

    Args:
        shown: whether an image stands before `prompt`, which is then the rest of a longer one.
    """
    ends = {len(prompt) - 1: len(words) - 1}
    if guard.policy.edit.span is Span.LAST:
        return ends
    images = [
        i for i, token in enumerate(prompt) if token in guard.policy.text_view.placeholder_ids
    ]
    first = 0 if shown else min(images, default=len(prompt))
    shared = 0
    while shared < min(first, len(words)) and prompt[shared] == words[shared]:
        shared += 1
    found: dict[int, int] = {}
    place = len(words) - 1
    for position in range(len(prompt) - 1, first - 1, -1):
        if place >= shared and prompt[position] == words[place]:
            found[position] = place
            place -= 1
    return found | ends


def followed(guard: Guard, answer: Sequence[int]) -> int:
    """How many tokens at an answer's start are edited as the opening of a refusal."""
    if guard.policy.edit.span is not Span.OPENING:
        return 0
    count = 0
    while (
        count < min(len(answer), len(guard.policy.refusal_prefix))
        and answer[count] == guard.policy.refusal_prefix[count]
    ):
        count += 1
    return count


def edit_by_hand(
    guard: Guard, text: Mapping[int, Tensor], spanned: Mapping[int, int], last: int | None = None
) -> Change:
    """The guard's edit of one token's state.

    Args:
        text: layer → (tokens, hidden) states of the text-only pass.
        spanned: from `counterparts`. Tokens after the last of them are edited as that one is, and
            earlier ones that are not among them are left alone.
        last: the prompt's last token, where `spanned` holds some of the answer's, too.
    """
    last = max(spanned) if last is None else last
    dtype = text[guard.policy.layers[0]].dtype
    basis = guard.policy.basis().to(dtype)

    def along(x: Tensor, layer: int) -> list[float]:
        """One coordinate after the other."""
        return [float((x.to(dtype) * basis[layer, k]).sum()) for k in range(guard.policy.rank)]

    harmful = {
        layer: along(guard.policy.directions.harmful_mean[layer], layer)
        for layer in guard.policy.layers
    }
    drift = {layer: along(guard.policy.drift[layer], layer) for layer in guard.policy.layers}
    wanted = {
        (layer, place): along(text[layer][place], layer)
        for layer in guard.policy.layers
        for place in spanned.values()
    }

    def change(layer: int, position: int, state: Tensor) -> Tensor:
        place = spanned.get(position, spanned[last] if position > last else None)
        if layer not in guard.policy.layers or place is None:
            return state
        result = state.clone()
        for k, now in enumerate(along(state, layer)):
            goal = target(
                guard.policy.edit.name,
                k,
                now,
                wanted[layer, place][k],
                harmful[layer][k] if place == spanned[last] else -math.inf,
                drift[layer][k],
                getattr(guard.policy.edit, "one_sided", True),
            )
            result = result + guard.policy.edit.strength * (goal - now) * basis[layer, k]
        return result

    return change


def guarded_by_hand(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
    question: str,
    *,
    steps: int,
) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and logits of a guarded answer: both passes by hand, nothing kept between.

    The text-only pass runs once, on the prompt and the opening of a refusal; the edit acts on the
    tokens it spans, with `Span.ANSWER` also on every token after the prompt, and on no other one.
    """
    words = text_ids(processor, question)
    text = run_row(model, [*words, *guard.policy.refusal_prefix])[0]
    inputs = ask(processor, [question], dtype=model.dtype)
    row = inputs["input_ids"][0].tolist()
    spanned = counterparts(guard, row, words)
    prompt, logits = len(row), []
    for _ in range(steps):
        opened = followed(guard, row[prompt:])
        behind = {prompt + i: len(words) + i for i in range(opened)}
        last = run_row(
            model,
            row,
            inputs["pixel_values"],
            change=edit_by_hand(guard, dict(enumerate(text)), spanned | behind, prompt - 1),
            stop=None if guard.policy.edit.span is Span.ANSWER else prompt + opened,
        )[1][-1]
        logits.append(last)
        row.append(int(last.argmax()))
    return row[prompt:], logits


def opened_by_hand(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    guard: Guard,
    question: str,
    *,
    length: int = 3,
) -> Guard:
    """The guard with an opening that its own answer to this question follows."""
    opening: tuple[int, ...] = ()
    for step in range(1, length + 1):
        guard = guard.variant(refusal_prefix=opening)
        opening = tuple(guarded_by_hand(model, processor, guard, question, steps=step)[0])
    return guard.variant(refusal_prefix=opening)


def spanning(guard: Guard, span: Span, **changes: Any) -> Guard:
    """The guard whose edit spans these tokens."""
    return guard.variant(edit=replace(guard.policy.edit, span=span), **changes)


def with_thresholds(
    guard: Guard, text: float, image: float | None = None, tokens: tuple[int, ...] = ()
) -> Guard:
    """The guard with these thresholds.

    Args:
        image: None where the multimodal pass is not to be looked at.
        tokens: that open refusals; where empty, the model's own decision is not asked for.
    """
    reads = guard.policy.criterion(TextScore)
    assert reads is not None
    looks = guard.policy.criterion(ImageScore)
    made: dict[str, Any] = {"budget": 0.1, "calibrated_on": 20}
    gate: list[AnyCriterion] = [TextScore(layers=reads.layers, threshold=text, **made)]
    if tokens:
        gate.insert(0, OwnRefusal(tokens=tokens, slack=1.0, layers=reads.layers))
    if image is not None:
        layer = guard.policy.layers[0] if looks is None else looks.layer
        gate.append(ImageScore(layer=layer, threshold=image, **made))
    return guard.variant(gate=tuple(gate))


def centred(guard: Guard, state: Tensor, layer: int) -> float:
    """Harm score of one state: +1 at the harmful anchors' mean, −1 at the harmless anchors'."""
    v = guard.policy.directions.vectors[layer, 0].double()
    at = float((state.double() * v).sum())
    high = float((guard.policy.directions.harmful_mean[layer].double() * v).sum())
    low = float((guard.policy.directions.harmless_mean[layer].double() * v).sum())
    return 2 * (at - low) / (high - low) - 1


def same_receipt(left: Receipt, right: Receipt) -> None:
    """Equal but for rounding."""
    for name in type(left).model_fields:
        ours, theirs = getattr(left, name), getattr(right, name)
        if name == "policy":
            continue  # the same may be done by another
        if name == "findings":
            assert left.scores == pytest.approx(right.scores, rel=1e-4, abs=1e-3)
            ours, theirs = ([(f.criterion, f.opened) for f in each] for each in (ours, theirs))
        assert ours == (
            pytest.approx(theirs, rel=1e-4, abs=1e-3) if isinstance(theirs, float) else theirs
        )


@contextmanager
def plain_hooks(
    model: PreTrainedModel,
    look: Callable[[torch.nn.Module, Any, dict[str, Any]], None],
    edit: Callable[[int, int, int, Tensor], Tensor],
) -> Iterator[None]:
    """Plain hooks: `look` before each pass of the model, `edit` after each layer for each token.

    Args:
        edit: takes layer, row, place in the pass and float64 state; gives the state to go on with.
    """

    def after(n: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            states = hidden_states(output).clone()
            for row in range(len(states)):
                for place in range(states.shape[1]):
                    edited = edit(n, row, place, states[row, place].double())
                    states[row, place] = edited.to(states.dtype)
            return with_hidden_states(output, states)

        return hook

    layers = Backbone.of(model).layers
    handles = [layer.register_forward_hook(after(n)) for n, layer in enumerate(layers)]
    handles.append(model.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reread_by_hand(
    model: PreTrainedModel, guard: Guard, texts: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Plain hooks that do the guard's edit, for one `generate` that reads all in every pass.

    That is without a cache: the prompt's tokens that the edit spans, and the answer's for as long
    as it follows the guard's opening. `texts` are the rows' text-only views.
    """
    readings = [text_reading(model, [*text, *guard.policy.refusal_prefix]) for text in texts]
    changes: list[tuple[Change, int]] = []  # of each row, and where its edits end
    prompt = 0

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal prompt
        rows = kwargs["input_ids"].tolist()
        prompt = prompt or len(rows[0])
        changes.clear()
        for number, row in enumerate(rows):
            request = number // (len(rows) // len(texts))
            text, reading = texts[request], readings[request]
            opened = followed(guard, row[prompt:])
            spanned = counterparts(guard, row[:prompt], text)
            spanned |= {prompt + i: len(text) + i for i in range(opened)}
            changes.append((edit_by_hand(guard, reading, spanned, prompt - 1), prompt + opened))

    def edit(n: int, row: int, place: int, state: Tensor) -> Tensor:
        change, end = changes[row]
        return change(n, place, state) if place < end else state

    with plain_hooks(model, look, edit):
        yield


@torch.no_grad()
def text_reading(model: PreTrainedModel, text: Sequence[int]) -> dict[int, Tensor]:
    """Layer → (tokens, hidden) float64 states of one text, read by the whole model."""
    states: dict[int, Tensor] = {}
    handles = [
        layer.register_forward_hook(
            lambda m, a, out, n=n: states.__setitem__(n, hidden_states(out)[0].double())
        )
        for n, layer in enumerate(Backbone.of(model).layers)
    ]
    model(input_ids=torch.tensor([list(text)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return states


@contextmanager
def edited_by_hand(
    model: PreTrainedModel, guard: Guard, texts: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Plain hooks that do the guard's edit of every row, for one `generate` without chunks.

    The first pass is the prompts', or of what a cache does not hold of them; the tokens that the
    edit spans are edited, and with `Span.ANSWER` every token of the later passes. `texts` are
    the rows' text-only views, read one at a time.
    """
    readings = [text_reading(model, text) for text in texts]
    calls = 0
    changes: list[Change] = []  # one a row
    prompt = 0  # tokens in a row of the first pass

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal calls, prompt
        calls += 1
        if calls > 1:
            return
        rows, cache = kwargs["input_ids"].tolist(), cache_in(kwargs)
        shown = cache is not None and cache.get_seq_length() > 0
        prompt, copies = len(rows[0]), len(rows) // len(texts)
        for number, row in enumerate(rows):
            spanned = counterparts(guard, row, texts[number // copies], shown=shown)
            changes.append(edit_by_hand(guard, readings[number // copies], spanned))

    def edit(n: int, row: int, place: int, state: Tensor) -> Tensor:
        if calls > 1 and guard.policy.edit.span is not Span.ANSWER:
            return state
        return changes[row](n, place if calls == 1 else prompt + place, state)

    with plain_hooks(model, look, edit):
        yield


def small_guard(model: PreTrainedModel, processor: Any) -> Guard:
    """Fitted on few of the shipped texts, for a model that one test alone needs; it edits."""
    return Guard.fit(
        model,
        processor,
        response=Response.EDIT,
        anchors=shipped_anchors()[:12],
        calibration=shipped_calibration()[:21],
        budget=0.2,
        rank=4,
        gate="calibrated",
    )


def refitted(guard: Guard, model: PreTrainedModel) -> Guard:
    """The guard as if it had been fitted on `model` with what acts in it; its policy is kept."""
    known = guard.fingerprint
    assert isinstance(known, Fingerprint)
    prompts = [[token for token in row if token >= 0] for row in known.prompts.tolist()]
    return guard.variant(
        fingerprint=Fingerprint.of(Backbone.of(model), prompts),
        provenance=guard.provenance.model_copy(update={"adapters": active_adapters(model)}),
    )
