"""The demo's measurement: the gap, the guard, and its controls, on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from vlm_safeguard.defences.variants import variants
from vlm_safeguard.evaluation.asks.benchmarks.own import scene_questions
from vlm_safeguard.evaluation.asks.conditions import condition_image
from vlm_safeguard.evaluation.asks.pictures import opened
from vlm_safeguard.evaluation.asks.prompts import Prompt
from vlm_safeguard.evaluation.asks.samples import Sample
from vlm_safeguard.evaluation.judges.refusal import is_refusal
from vlm_safeguard.evaluation.judges.utility import names_answer
from vlm_safeguard.evaluation.results.counting import ClosedGates
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import Replies, Row, generate_replies
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.timing import generation_ratio

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_safeguard.guard import Guard

CONDITIONS = ("text", "blank", "noise", "image")
REFUSAL_TOKENS = 5  # enough to read an opening such as "I'm sorry, but I can't"
ANSWER_TOKENS = 14  # enough for the longest right answer to an image question


def run_demo(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    guard: Guard,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    questions: int,
    batch_size: int,
    report: Callable[[str, int, int], None],
) -> Results:
    """Every defence on every image condition; then utility and time.

    Args:
        questions: number of image questions for utility.
        report: called with (what is running, replies done, replies in all).
    """
    guards: dict[str, Guard | None] = {"none": None, **variants(guard)}
    prompts = {"harmful": harmful, "harmless": harmless}
    each = len(CONDITIONS) * (len(harmful) + len(harmless))
    total = len(guards) * each + 3 * questions
    done = 0

    def replies_to(
        what: str,
        texts: Sequence[str],
        images: Sequence[Image | None],
        guards: Mapping[str, Guard | None],
        tokens: int,
    ) -> dict[str, Replies]:
        def after_batch(name: str, count: int) -> None:
            nonlocal done
            done += count
            report(f"{what}: {name}", done, total)

        return generate_replies(
            model,
            processor,
            texts,
            images,
            guards,
            max_new_tokens=tokens,
            batch_size=batch_size,
            after_batch=after_batch,
        )

    rows: list[Row] = []
    closed = identical = 0
    for kind, requests in prompts.items():
        for conditions in (CONDITIONS[:1], CONDITIONS[1:]):
            texts = [prompt.text for prompt in requests]
            images = [
                condition_image(condition, number)
                for condition in conditions
                for number in range(len(texts))
            ]
            found = replies_to(
                f"{kind}, {' + '.join(conditions)}",
                texts * len(conditions),
                images,
                guards,
                REFUSAL_TOKENS,
            )
            for place, condition in enumerate(conditions):
                there = slice(place * len(texts), (place + 1) * len(texts))
                rows += [
                    Row.count(
                        [is_refusal(reply) for reply in replies.texts[there]],
                        defence=defence,
                        condition=condition,
                        prompts=kind,
                        metric="refusal",
                    )
                    for defence, replies in found.items()
                ]
            for mine, plain, receipt in zip(
                found["default"].tokens,
                found["none"].tokens,
                found["default"].receipts,
                strict=True,
            ):
                closed += not receipt.guarded
                identical += not receipt.guarded and torch.equal(mine, plain)

    asked = scene_questions(questions)
    texts = [sample.text for sample in asked]
    blind: list[Image | None] = [None] * questions
    seeing: list[Image | None] = [opened(s.image) for s in asked if s.image is not None]
    for condition, shown, compared in (
        ("text", blind, {"none": None}),  # the best guess without looking
        ("image", seeing, {"none": None, "default": guard}),
    ):
        found = replies_to(f"image questions, {condition}", texts, shown, compared, ANSWER_TOKENS)
        for defence, replies in found.items():
            outcomes = [
                names_answer(sample, reply)
                for sample, reply in zip(asked, replies.texts, strict=True)
            ]
            rows.append(
                Row.count(
                    outcomes,
                    defence=defence,
                    condition=condition,
                    prompts="utility",
                    metric="accuracy",
                )
            )
    timed = [prompt.text for prompt in (*harmful[:4], *harmless[:4])]
    inputs = model_inputs(model, processor, timed, [blank_image()] * len(timed))
    ratio = generation_ratio(model, inputs, guard)
    return Results(
        model=guard.provenance.model_name,
        rows=rows,
        time_ratio=ratio.median,
        time_ratio_range=(ratio.low, ratio.high),
        closed_gates=ClosedGates(answers=closed, identical=identical),
        other={
            "utility_majority_accuracy": majority_accuracy(asked),
            "max_new_tokens": REFUSAL_TOKENS,
            "judge": "refusal",
        },
    )


def majority_accuracy(samples: Sequence[Sample]) -> float:
    """Accuracy of always giving each category's most frequent answer, chosen in hindsight."""
    answers: dict[str, list[str | None]] = {}
    for sample in samples:
        answers.setdefault(sample.category, []).append(sample.answer)
    best = sum(max(given.count(a) for a in set(given)) for given in answers.values())
    return best / len(samples)
