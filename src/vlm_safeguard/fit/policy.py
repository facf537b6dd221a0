"""Fitting a guard's policy: measure the model, choose by what was measured, assemble.

The model is descended to twice: for the states of texts, by which the layers are chosen; then for
what depends on that choice: states beside images, and the words of the model's own refusals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from warnings import warn

import torch

from vlm_safeguard.anchors import MINIMUM_PAIRS
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.fit.data import FitData
from vlm_safeguard.fit.further import Measured, measure_further
from vlm_safeguard.fit.own_decision import measure_own_decision, own_measures
from vlm_safeguard.fit.questions import measure_questions
from vlm_safeguard.images import blank_image, meaningless_image
from vlm_safeguard.model.activations import image_states, text_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.model.generation_prompt import (
    behind_thinking,
    common_start,
    learn_generation_prompt,
)
from vlm_safeguard.model.refusal import refusal_tokens
from vlm_safeguard.model.sentences import learn_sentences
from vlm_safeguard.model.template import learn_text_view
from vlm_safeguard.policy.calibration import Judged, OwnDecision, calibrate
from vlm_safeguard.policy.choice import Choice, TextStates, choose
from vlm_safeguard.policy.edits import Edit
from vlm_safeguard.policy.gate import GATES, AnyCriterion
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.soundness import check_layers

if TYPE_CHECKING:
    from transformers import ProcessorMixin

DISCRIMINANT, CALIBRATED = "discriminant", "calibrated"
DEFAULT_GATE = DISCRIMINANT


@torch.no_grad()
def fit_policy(
    backbone: Backbone,
    processor: ProcessorMixin,
    data: FitData,
    options: FitOptions,
    *,
    edit: Edit,
    gate: str,
    response: Response,
    layers: Sequence[int] | None,
    batch_size: int,
) -> tuple[Policy, dict[str, torch.Tensor]]:
    """A policy for a model, and the scores of what it was fitted on.

    Raises:
        SafeguardError: the model, the processor, the data or the options cannot be used, and why.
    """
    rank = _rank(options, len(data.anchors), backbone.hidden_size)
    if gate not in (DISCRIMINANT, CALIBRATED, *GATES):
        names = ", ".join([DISCRIMINANT, CALIBRATED, *GATES])
        raise SafeguardError(f"There is no gate '{gate}'; there are {names}.")
    if layers is not None:
        check_layers(layers, len(backbone.layers))
    view = learn_text_view(processor, backbone.placeholder_ids)
    asked = [encode_chat(processor, request) for request in data.requests]
    prompt = learn_generation_prompt(processor)

    rows = _judged(prompt, asked)
    texts, own = _measure_texts(backbone, data, rows, options, batch_size)
    if own is None:
        later = _past_beginnings(backbone, processor, data, asked, prompt, options)
        if later is not None:
            prompt, rows = later, _judged(later, asked)
            texts, own = _measure_texts(backbone, data, rows, options, batch_size)
    if own is None and gate not in GATES:
        warn(
            "The model's own refusals cannot be read where its answers begin (it refuses too few "
            "of the harmful anchors there, or thinks first), so the gate rests on the texts' harm "
            "scores alone.",
            stacklevel=3,
        )
    choice = choose(texts, rank, layers, options)
    shift = _measure_drift(backbone, processor, data, texts, options, batch_size)
    scores, ordinary = dict(choice.scores), rows[-len(data.calibration) :]
    further, sentences, harmless = None, None, Judged.whole(scores["calibration"], None)
    if gate == DISCRIMINANT:
        if options.sentences:
            bounds = options.sentence_tokens, options.sentences
            sentences = learn_sentences(processor, prompt, *bounds)
        further, own = measure_further(
            backbone,
            processor,
            prompt,
            data,
            Measured(texts, ordinary, own),
            sentences,
            options,
            batch_size,
        )
        harmless = further.judged
    elif gate == CALIBRATED and own is not None:
        measures = own_measures(backbone, ordinary, texts.final[2], own)
        harmless = Judged.whole(scores["calibration"], measures)
    if gate not in GATES and choice.image_layer is not None:
        scores["calibration_image"] = _measure_image_scores(
            backbone, processor, data, choice, batch_size
        )
    gates: tuple[AnyCriterion, ...]
    if gate in GATES:
        gates = GATES[gate]
    else:
        questions = measure_questions(
            backbone, processor, prompt, choice, own, further, sentences, batch_size
        )
        gates = calibrate(choice, own, harmless, scores, questions, options, further)
    if further is not None:
        scores["calibration"] = further.judged.highest
        pairs = len(further.shrunk.harmful)
        scores["harmful"] = further.shrunk.harmful
        scores["harmless"] = further.shrunk.harmless[:pairs].clone()
    policy = Policy(
        directions=choice.directions,
        drift=shift,
        layers=choice.layers,
        rank=rank,
        edit=edit,
        gate=gates,
        text_view=view,
        generation_prompt=prompt,
        refusal_prefix=() if own is None else own.prefix,
        other_prefixes=() if own is None else own.other_prefixes,
        sentences=sentences,
        response=response,
        discriminant=None if further is None else further.shrunk.discriminant,
    )
    return policy, scores


# --- measuring ---


def _judged(prompt: GenerationPrompt, asked: Sequence[Sequence[int]]) -> list[list[int]]:
    return [prompt.judged(row) for row in asked]


def _measure_texts(
    backbone: Backbone,
    data: FitData,
    rows: Sequence[Sequence[int]],
    options: FitOptions,
    batch_size: int,
) -> tuple[TextStates, OwnDecision | None]:
    states, final = text_states(backbone, rows, batch_size=batch_size)
    if not torch.isfinite(states).all():
        raise SafeguardError(
            f"The model's hidden states are not finite in {backbone.model.dtype}; load it in "
            "bfloat16 or float32."
        )
    sizes = [len(data.anchors), len(data.anchors), len(data.calibration)]
    harmful, harmless, calibration = torch.split(states, sizes)
    texts = TextStates(harmful, harmless, calibration, final=torch.split(final, sizes))
    return texts, measure_own_decision(backbone, rows, texts, options)


def _past_beginnings(
    backbone: Backbone,
    processor: ProcessorMixin,
    data: FitData,
    asked: Sequence[Sequence[int]],
    prompt: GenerationPrompt,
    options: FitOptions,
) -> GenerationPrompt | None:
    """The prompt with what nearly all answers begin with, if refusals can be told behind it."""
    pairs, count = len(data.anchors), options.refusal_anchors
    harmful, harmless = asked[:pairs][:count], asked[pairs : 2 * pairs][:count]
    start = common_start(
        backbone,
        _judged(prompt, [*harmful, *harmless]),
        options.beginning_tokens,
        options.beginning_share,
    )
    further = prompt.past(behind_thinking(processor, prompt.direct, start))
    if further == prompt:
        return None
    refused, answered = (
        text_states(backbone, _judged(further, rows))[1] for rows in (harmful, harmless)
    )
    tokens = refusal_tokens(backbone, refused, answered, options.refusal_likelier)
    return further if tokens else None


def _measure_drift(
    backbone: Backbone,
    processor: ProcessorMixin,
    data: FitData,
    texts: TextStates,
    options: FitOptions,
    batch_size: int,
) -> torch.Tensor:
    """(layers, hidden) mean shift of the first anchors' states by a blank image."""
    shown = data.anchors[: options.drift_pairs]
    asked = [a.harmful for a in shown] + [a.harmless for a in shown]
    blanks = image_states(
        backbone,
        processor,
        asked,
        [blank_image()] * len(asked),
        batch_size=batch_size,
        label="blank image",
    )
    plain = torch.cat([texts.harmful[: len(shown)], texts.harmless[: len(shown)]])
    return (blanks - plain).mean(0)


def _measure_image_scores(
    backbone: Backbone, processor: ProcessorMixin, data: FitData, choice: Choice, batch_size: int
) -> torch.Tensor:
    """(requests,) harm scores of the calibration requests, each beside an image without meaning."""
    assert choice.image_layer is not None
    states = image_states(
        backbone,
        processor,
        data.calibration,
        [meaningless_image(i) for i in range(len(data.calibration))],
        upto=choice.image_layer,
        batch_size=batch_size,
        label="meaningless images",
    )
    return choice.directions.harm_score(states[:, choice.image_layer], choice.image_layer)


def _rank(options: FitOptions, pairs: int, hidden: int) -> int:
    """As many directions as were asked for; of the default, as many as there can be."""
    rank = options.rank
    if "rank" not in options.model_fields_set:
        rank = min(rank, pairs, hidden)
    if pairs < max(MINIMUM_PAIRS, rank):
        raise SafeguardError(
            f"{pairs} anchor pairs are too few for {rank} directions; give at least "
            f"{max(MINIMUM_PAIRS, rank)}, better 100."
        )
    return rank
