"""Where a model's answers begin, learnt from its chat template, and past what it says before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import encode_messages, tokenizer_of, user_turn
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.token_ids import same_start, shared_start

if TYPE_CHECKING:
    from transformers import ProcessorMixin

QUESTIONS = ("What is shown here?", "Describe it in one word.", "Name two colours, please")
_ANSWERS = ("Sure, gladly.", "A red ball")
#: By which templates let a model think before it answers, or not.
_SWITCHES = ("enable_thinking", "thinking")
_THINKS, _THOUGHT = "<think>", "</think>"


def learn_generation_prompt(processor: ProcessorMixin) -> GenerationPrompt:
    """Read off what the template writes behind a request, by asking questions in each of its ways.

    Raises:
        SafeguardError: it writes nothing that all questions share.
    """
    questions = [[user_turn(question)] for question in QUESTIONS]
    forms = {"default": _behind(processor, questions)}
    if not forms["default"]:
        raise SafeguardError(
            "The chat template writes nothing between a request and its answer, so where a request "
            "ends cannot be known."
        )
    for switch in _SWITCHES:
        if not re.search(rf"\b{switch}\b", str(processor.chat_template)):
            continue
        for value in (False, True):
            forms[f"{switch}={value}"] = _behind(processor, questions, **{switch: value})
    with suppress(SafeguardError):  # a template for one turn only
        forms["continue_final_message"] = _before_given_answers(processor)
    different: dict[str, tuple[int, ...]] = {}
    for name, ids in forms.items():
        if ids and ids not in different.values():
            different[name] = ids
    direct = next((different[f"{s}=False"] for s in _SWITCHES if f"{s}=False" in different), None)
    tokenizer = tokenizer_of(processor)
    vocabulary = tokenizer.get_vocab()
    special = frozenset(tokenizer.all_special_ids) - {
        vocabulary.get(_THINKS),
        vocabulary.get(_THOUGHT),
    }
    return GenerationPrompt(
        forms=different,
        direct=direct or different["default"],
        special_ids=special,
        next_turn=_between_turns(processor),
    )


@torch.no_grad()
def common_start(
    backbone: Backbone, texts: Sequence[Sequence[int]], longest: int, share: float
) -> tuple[int, ...]:
    """What the answers to at least this share of `texts` begin with, decoded greedily."""
    start: tuple[int, ...] = ()
    while len(start) < longest:
        states = backbone.run_text(texts, start)[:, -1]
        tokens = backbone.next_token_logits(states).argmax(-1).tolist()
        token, count = Counter(tokens).most_common(1)[0]
        if count < share * len(texts):
            break
        start += (token,)
    return start


def behind_thinking(
    processor: ProcessorMixin, direct: Sequence[int], start: Sequence[int]
) -> tuple[int, ...]:
    """What all answers begin with, and the end of the thinking that it, or `direct`, begins."""
    tokenizer = tokenizer_of(processor)
    vocabulary = tokenizer.get_vocab()
    thinks, thought = vocabulary.get(_THINKS, -1), vocabulary.get(_THOUGHT, -1)
    ids = [*direct, *start]
    if thought < 0 or thinks not in ids or thought in ids[ids.index(thinks) :]:
        return tuple(start)
    begun = max(ids.index(thinks) + 1 - len(direct), 0)  # nothing is thought
    closed = tokenizer.encode(f"\n{_THOUGHT}\n\n", add_special_tokens=False)
    return (*start[:begun], *closed)


def _behind(
    processor: ProcessorMixin, questions: Sequence[list[dict[str, Any]]], **options: Any
) -> tuple[int, ...]:
    """What stands at the end of all of these conversations."""
    rows = [encode_messages(processor, messages, **options) for messages in questions]
    return _end(rows)


def _before_given_answers(processor: ProcessorMixin) -> tuple[int, ...]:
    """What stands before an answer that the template is given to begin with.

    Raises:
        SafeguardError: it cannot be given one.
    """
    before = []
    for question in QUESTIONS:
        rows = [
            encode_messages(
                processor,
                [user_turn(question), _answer_turn(answer)],
                add_generation_prompt=False,
                continue_final_message=True,
            )
            for answer in _ANSWERS
        ]
        before.append(shared_start(rows))
    return _end(before)


def _between_turns(processor: ProcessorMixin) -> tuple[int, ...]:
    """What stands between an answer and the next request; nothing where there is only one turn."""
    first = [user_turn(QUESTIONS[0]), _answer_turn(_ANSWERS[0])]
    try:
        alone = encode_messages(processor, first, add_generation_prompt=False)
        rows = [
            encode_messages(processor, [*first, user_turn(question)], add_generation_prompt=False)
            for question in QUESTIONS[1:]
        ]
    except SafeguardError:
        return ()
    shared = shared_start(rows)
    return tuple(shared[same_start(alone, shared) :])


def _answer_turn(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def _end(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The common end of sequences."""
    return tuple(shared_start([row[::-1] for row in rows])[::-1])
