"""Perplexity: how likely answers are as text, behind the bare requests they answer.

Whatever defence wrote an answer, it is scored behind its request alone, in the chat template,
without images: what is compared are answers, not prompts. The scoring model is a language model of
its own, or a vision-language model's language model.

An answer without a token has no likelihood: it is left out of a perplexity, and its count said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.rendering import longest, opens_itself, render_chats
from vlm_safeguard.evaluation.statistics import Estimate, bootstrap
from vlm_safeguard.model.backbone import input_device
from vlm_safeguard.model.conversation import chat_of, encode_chat
from vlm_safeguard.model.vlm import VLM, LanguageModel


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: its negative log-likelihood in nats, all tokens together, and their count."""

    nll: float
    tokens: int


@torch.inference_mode()
def likelihoods(
    scorer: VLM | LanguageModel,
    requests: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 8,
) -> list[Likelihood]:
    """The likelihood of each answer given its request, −Σ log p(token | request, earlier tokens).

    An answer's tokens are those of its text alone, without the one that ends it: whether an answer
    was cut short should not matter.

    Args:
        scorer: to which no guard is attached.

    Raises:
        SafeguardError: the template cannot write a request, an answer is longer than the model
            reads, or a likelihood is not finite.
    """
    tokenizer = scorer.tokenizer
    prompts = _prompts(scorer, requests)
    ids: list[list[int]] = [
        tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers
    ]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, ids, strict=True)]
    limit = longest(scorer.model)
    if max(lengths, default=0) > limit:
        raise SafeguardError(
            f"Request and answer have up to {max(lengths)} tokens and the scoring model reads "
            f"{limit}: take shorter answers or another model."
        )
    scores = {i: Likelihood(0.0, 0) for i, answer in enumerate(ids) if not answer}
    order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        log_probs = _log_probs(scorer, [prompts[i] for i in batch], [ids[i] for i in batch])
        for i, values in zip(batch, log_probs, strict=True):
            nll = -float(values.double().sum())
            if not nll < float("inf"):
                raise SafeguardError(
                    f"The scoring model gives answer {i} no finite likelihood: load it in "
                    "float32 or bfloat16."
                )
            scores[i] = Likelihood(nll, len(ids[i]))
    return [scores[i] for i in range(len(ids))]


def perplexity(scored: Sequence[Likelihood]) -> Estimate:
    """exp(Σ nll / Σ tokens) of a set of answers, with its bootstrap interval over answers.

    `n` counts the answers that have a token; the others say nothing and are left out.

    Raises:
        SafeguardError: none has one.
    """
    likely = [each for each in scored if each.tokens]
    if not likely:
        raise SafeguardError(f"All {len(scored)} answers are empty, so they have no perplexity.")
    columns = [[each.nll for each in likely], [float(each.tokens) for each in likely]]
    return bootstrap(columns, lambda means: (means[:, 0] / means[:, 1]).exp())


def _prompts(scorer: VLM | LanguageModel, requests: Sequence[str]) -> list[list[int]]:
    """Token ids of requests in the chat template, ready for the answer."""
    if isinstance(scorer, VLM):
        return [encode_chat(scorer.processor, request) for request in requests]
    tokenizer = scorer.tokenizer
    texts = render_chats(tokenizer, [chat_of(request) for request in requests])
    return [
        tokenizer(text, add_special_tokens=not opens_itself(tokenizer, text))["input_ids"]
        for text in texts
    ]


def _log_probs(
    scorer: VLM | LanguageModel, prompts: list[list[int]], answers: list[list[int]]
) -> list[torch.Tensor]:
    """(tokens,) log-probabilities of each answer behind its prompt.

    Those of a causal language model are padded on the right, where no token can see it.
    """
    if isinstance(scorer, VLM):
        return scorer.backbone.answer_log_probs(prompts, answers)
    model, device = scorer.model, input_device(scorer.model)
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    log_probs = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        dtype = torch.promote_types(before.dtype, torch.float32)
        every = before.to(dtype).log_softmax(-1)
        tokens = torch.tensor(answer, device=every.device)
        log_probs.append(every.gather(-1, tokens[:, None])[:, 0])
    return log_probs
