"""Perplexity against one answer at a time, one token at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from support.reference import make_exact, run_row, text_ids
from tiny import load_makers
from tiny.language_model import language_model, tokenizer_with
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.probes.perplexity import (
    Likelihood,
    likelihoods,
    perplexity,
)
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import model_inputs
from vlm_safeguard.model.conversation import encode_chat
from vlm_safeguard.model.vlm import VLM, LanguageModel

REQUESTS = ["How to bake", "How to steal a car from a neighbour at night", "Why?", "How to swim"]
ANSWERS = ["Mix flour and water, wait a day, and bake it.", "No.", "", "Slowly, and not alone"]
CHAT = "{{ bos_token }}{% for m in messages %}Q: {{ m['content'] }}{{ '\n' }}{% endfor %}A:"


def nll_of(logits: torch.Tensor, ids: Sequence[int], answer: int) -> float:
    """−Σ log softmax, one token at a time, of the last `answer` of `ids`."""
    total = 0.0
    for place in range(len(ids) - answer, len(ids)):
        scores = logits[place - 1].double().tolist()
        top = max(scores)
        total -= scores[ids[place]] - top - math.log(sum(math.exp(s - top) for s in scores))
    return total


def exact(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return make_exact(model)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_language_models_likelihoods(side: Literal["left", "right"], batch_size: int) -> None:
    tokenizer = tokenizer_with(CHAT)
    tokenizer.padding_side = side
    model = language_model(tokenizer)
    reference = exact(language_model(tokenizer))
    found = likelihoods(LanguageModel(model, tokenizer), REQUESTS, ANSWERS, batch_size=batch_size)
    finer = likelihoods(
        LanguageModel(reference, tokenizer), REQUESTS, ANSWERS, batch_size=batch_size
    )
    for request, answer, one, fine in zip(REQUESTS, ANSWERS, found, finer, strict=True):
        prompt = tokenizer(f"<s>Q: {request}\nA:", add_special_tokens=False)["input_ids"]
        said = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = prompt + said
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([ids])).logits[0]
        wanted = nll_of(logits, ids, len(said))
        assert one.tokens == fine.tokens == len(said)
        assert fine.nll == pytest.approx(wanted, abs=1e-9)
        assert one.nll == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_vlms_own_language_model_reads_text_alone(
    model: LlavaForConditionalGeneration,
    exact_model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    batch_size: int,
) -> None:
    found = likelihoods(VLM(model, processor), REQUESTS, ANSWERS, batch_size=batch_size)
    for request, answer, one in zip(REQUESTS, ANSWERS, found, strict=True):
        said = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = text_ids(processor, request) + said
        wanted = nll_of(run_row(exact_model, ids)[1], ids, len(said))
        assert one.tokens == len(said)
        assert one.nll == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "family", ["gemma3", "mllama", "qwen2_5_vl", "paligemma", "cohere2_vision"]
)
def test_families_likelihoods_are_those_of_generate(family: str) -> None:
    """Made to write the answer by `generate`, unpadded, each model gives these likelihoods."""
    model, processor = load_makers()[family]()
    requests, answers = REQUESTS[:2], ANSWERS[:2]
    found = likelihoods(VLM(model, processor), requests, answers)
    for request, answer, one in zip(requests, answers, found, strict=True):
        assert one.nll == pytest.approx(forced_nll(model, processor, request, answer), rel=1e-3)


def forced_nll(model: PreTrainedModel, processor: object, request: str, answer: str) -> float:
    said = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]  # type: ignore[attr-defined]
    inputs = model_inputs(model, processor, [request], [None])  # type: ignore[arg-type]
    start = inputs["input_ids"].shape[1]
    assert inputs["input_ids"][0].tolist() == encode_chat(processor, request)  # type: ignore[arg-type]
    output = model.generate(
        **inputs,
        max_new_tokens=len(said),
        min_new_tokens=len(said),
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, ids: [said[min(len(ids) - start, len(said) - 1)]],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return -sum(
        float(logits[0].double().log_softmax(-1)[token])
        for token, logits in zip(said, output.logits, strict=True)
    )


def test_perplexity_is_of_tokens_and_leaves_empty_answers_out() -> None:
    scored = [Likelihood(4.0, 2), Likelihood(0.0, 0), Likelihood(1.0, 8)]
    found = perplexity(scored)
    assert found.n == 2
    assert found.value == pytest.approx(math.exp(5 / 10))
    assert found.low == pytest.approx(math.exp(1 / 8))  # resamples of one answer only
    assert found.high == pytest.approx(math.exp(4 / 2))
    with pytest.raises(SafeguardError, match="All 2 answers are empty"):
        perplexity([Likelihood(0.0, 0)] * 2)


def test_what_cannot_be_scored_is_refused(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, open_guard: Guard
) -> None:
    tokenizer = tokenizer_with(CHAT)
    short = language_model(tokenizer, max_position_embeddings=16)
    with pytest.raises(SafeguardError, match="reads 16"):
        likelihoods(LanguageModel(short, tokenizer), REQUESTS, ANSWERS)
    broken = language_model(tokenizer)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(SafeguardError, match="no finite likelihood"):
        likelihoods(LanguageModel(broken, tokenizer), REQUESTS, ANSWERS)
    with pytest.raises(SafeguardError, match="chat template"):
        likelihoods(LanguageModel(broken, tokenizer_with(None)), REQUESTS, ANSWERS)
    with open_guard.attach(model), pytest.raises(SafeguardError, match="outside the guarded"):
        likelihoods(VLM(model, processor), REQUESTS, ANSWERS)
    assert likelihoods(LanguageModel(broken, tokenizer), ["How?"], [""]) == [Likelihood(0.0, 0)]
    assert likelihoods(VLM(model, processor), [], []) == []
