"""Fitting on further forms of requests: in wrappers, in other languages, as second turns.

They give the discriminant, which judges whole requests and sentences alone, and the tokens and
words that refusals open with in other languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from warnings import warn

import torch

from vlm_safeguard.fit.data import FitData
from vlm_safeguard.fit.own_decision import own_measures
from vlm_safeguard.forms import (
    FollowUp,
    Pair,
    further_calibration,
    further_pairs,
    shipped_wrappers,
)
from vlm_safeguard.model.activations import text_states
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import (
    answer_turn,
    encode_messages,
    takes_turns,
    user_turn,
)
from vlm_safeguard.model.refusal import refusal_margins, refusal_prefix, refusal_tokens
from vlm_safeguard.policy.calibration import Further, Judged, OwnDecision
from vlm_safeguard.policy.choice import TextStates
from vlm_safeguard.policy.discriminant import choose_discriminant
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.sentences import Sentences

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Measured:
    """What is known from the anchors and the calibration requests as they are.

    Attributes:
        rows: token ids of the calibration requests.
        own: the model's own decision; None where it cannot be read.
    """

    texts: TextStates
    rows: Sequence[Sequence[int]]
    own: OwnDecision | None


def measure_further(
    backbone: Backbone,
    processor: ProcessorMixin,
    prompt: GenerationPrompt,
    data: FitData,
    plain: Measured,
    sentences: Sentences | None,
    options: FitOptions,
    batch_size: int,
) -> tuple[Further, OwnDecision | None]:
    """A discriminant of requests in all forms, and the model's own decision in all languages.

    Where the processor can write one turn only, there are no second turns among the forms.
    """
    wrappers = shipped_wrappers() if options.wrappings else []
    pairs = further_pairs(data.anchors, wrappers, options.wrappings, options.folds)
    calibration = further_calibration(data.calibration, wrappers, options.folds)
    if not takes_turns(processor):
        warn(
            "The processor can write one turn only, so the gate's discriminant is fitted without "
            "requests as second turns.",
            stacklevel=4,
        )
        pairs = [pair for pair in pairs if isinstance(pair.harmful, str)]
        calibration = [each for each in calibration if isinstance(each.request, str)]
    asked = [each.request for each in calibration]
    requests = [*(p.harmful for p in pairs), *(p.harmless for p in pairs), *asked]
    rows = [prompt.judged(encode(processor, request)) for request in requests]
    whole = [*plain.rows, *rows[2 * len(pairs) :]]
    parts, owners = parted(whole, sentences, prompt)
    rows += parts
    sizes = [len(pairs), len(pairs), len(rows) - 2 * len(pairs)]
    states, final = text_states(backbone, rows, batch_size=batch_size, label="further forms")
    harmful, harmless, ordinary = torch.split(states, sizes)

    topics = [*range(len(data.anchors)), *(pair.topic for pair in pairs)]
    ordinary_topics = [*range(len(data.calibration)), *(each.topic for each in calibration)]
    ordinary_topics = [ordinary_topics[owner] for owner in owners]
    shrunk = choose_discriminant(
        torch.cat([plain.texts.harmful, harmful]),
        torch.cat([plain.texts.harmless, harmless, plain.texts.calibration, ordinary]),
        (
            torch.tensor(topics) % options.folds,
            torch.tensor([*topics, *ordinary_topics]) % options.folds,
        ),
        options.shrinkages,
        options.near_best,
    )
    scores = shrunk.harmless[len(topics) :].clone()
    if plain.own is None:
        return Further(shrunk, Judged(scores, None, torch.tensor(owners))), None
    finals = torch.split(final, sizes)
    harmful_rows = rows[: len(pairs)]
    own = _in_all_languages(backbone, pairs, harmful_rows, finals, plain.own, options)
    measures = own_measures(backbone, whole, torch.cat([plain.texts.final[2], finals[2]]), own)
    return Further(shrunk, Judged(scores, measures, torch.tensor(owners))), own


def parted(
    rows: Sequence[Sequence[int]], sentences: Sentences | None, prompt: GenerationPrompt
) -> tuple[list[list[int]], list[int]]:
    """The sentences of requests as token ids; and the request of each row, then of each sentence.

    Args:
        sentences: None where requests are judged whole alone.
    """
    parts: list[list[int]] = []
    owners = [*range(len(rows))]
    if sentences is None:
        return parts, owners
    for owner, row in enumerate(rows):
        alone = sentences.alone(tuple(row), prompt)
        parts += [list(part) for part in alone]
        owners += [owner] * len(alone)
    return parts, owners


def _in_all_languages(
    backbone: Backbone,
    pairs: Sequence[Pair],
    rows: Sequence[Sequence[int]],
    finals: Sequence[torch.Tensor],
    own: OwnDecision,
    options: FitOptions,
) -> OwnDecision:
    """With what opens the model's refusals in each language in which it refuses.

    Args:
        rows: token ids of the pairs' harmful requests.
        finals: (n, hidden) final states of the pairs' harmful requests, of their harmless ones, ….
    """
    tokens = set(own.tokens)
    prefixes = {own.prefix[:1]: own.prefix}  # by their first tokens
    for language in dict.fromkeys(pair.language for pair in pairs):
        mine = [i for i, pair in enumerate(pairs) if pair.language == language]
        refused, answered = (states[mine] for states in finals[:2])
        opening = refusal_tokens(backbone, refused, answered, options.refusal_likelier)
        if not opening:
            continue
        declined = [
            refusal_margins(backbone, states, opening) > 0 for states in (refused, answered)
        ]
        shares = [float(each.float().mean()) for each in declined]
        if shares[0] - shares[1] < options.refusal_contrast:
            continue
        tokens |= set(opening)
        if language != Pair.language:  # of those in the anchors' own, the prefix is known
            places = declined[0].nonzero()[: options.refusal_anchors, 0].tolist()
            prompts = [tuple(rows[mine[place]]) for place in places]
            read = backbone.read_texts(prompts)
            prefix = refusal_prefix(backbone, read, prompts, options.prefix_tokens)
            if len(prefix) > 1:  # one token is no words
                prefixes.setdefault(prefix[:1], prefix)
    others = tuple(prefix for prefix in prefixes.values() if prefix != own.prefix)
    return replace(own, tokens=tuple(sorted(tokens)), other_prefixes=others)


def encode(processor: ProcessorMixin, request: str | FollowUp) -> list[int]:
    """Token ids of a conversation that ends in the request, ready for the answer."""
    if isinstance(request, str):
        return encode_messages(processor, [user_turn(request)])
    turns = [user_turn(request.first), answer_turn(request.answer), user_turn(request.request)]
    return encode_messages(processor, turns)
