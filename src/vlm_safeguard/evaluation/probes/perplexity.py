"""Perplexity: how likely answers are as text, behind the bare requests they answer.

Whatever defence wrote an answer, it is scored behind its request alone, in the chat template,
without images: what is compared are answers, not prompts. The scoring model is a language model of
its own, or a vision-language model's language model.

An answer without a token has no likelihood: it is left out of a perplexity, and its count said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.rendering import longest, opens_itself, render_chats
from vlm_safeguard.evaluation.statistics import Estimate, bootstrap
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.conversation import chat_of, encode_chat, tokenizer_of
from vlm_safeguard.model.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: its negative log-likelihood in nats, all tokens together, and their count."""

    nll: float
    tokens: int


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    requests: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 8,
) -> list[Likelihood]:
    """The likelihood of each answer given its request, −Σ log p(token | request, earlier tokens).

    An answer's tokens are those of its text alone, without the one that ends it: whether an answer
    was cut short should not matter.

    Args:
        model: a causal language model, or a vision-language model, to which no guard is attached.
        processor: its tokenizer or processor.

    Raises:
        SafeguardError: the template cannot write a request, an answer is longer than the model
            reads, or a likelihood is not finite.
    """
    tokenizer = tokenizer_of(processor)
    backbone = Backbone.of(model) if _sees(model) else None
    prompts: list[list[int]]
    if backbone is not None:
        sees = cast("ProcessorMixin", processor)  # what a model that sees images comes with
        prompts = [encode_chat(sees, request) for request in requests]
    else:
        texts = render_chats(processor, [chat_of(request) for request in requests])
        prompts = [
            tokenizer(text, add_special_tokens=not opens_itself(tokenizer, text))["input_ids"]
            for text in texts
        ]
    ids: list[list[int]] = [
        tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers
    ]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, ids, strict=True)]
    if max(lengths, default=0) > longest(model):
        raise SafeguardError(
            f"Request and answer have up to {max(lengths)} tokens and the scoring model reads "
            f"{longest(model)}: take shorter answers or another model."
        )
    found = {i: Likelihood(0.0, 0) for i, answer in enumerate(ids) if not answer}
    order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        asked, given = [prompts[i] for i in batch], [ids[i] for i in batch]
        if backbone is not None:
            log_probs = backbone.answer_log_probs(asked, given)
        else:
            log_probs = _log_probs(model, asked, given)
        for i, values in zip(batch, log_probs, strict=True):
            nll = -float(values.double().sum())
            if not nll < float("inf"):
                raise SafeguardError(
                    f"The scoring model gives answer {i} no finite likelihood: load it in "
                    "float32 or bfloat16."
                )
            found[i] = Likelihood(nll, len(ids[i]))
    return [found[i] for i in range(len(ids))]


def perplexity(scored: Sequence[Likelihood]) -> Estimate:
    """exp(Σ nll / Σ tokens) of a set of answers, with its bootstrap interval over answers.

    `n` counts the answers that have a token; the others say nothing and are left out.

    Raises:
        SafeguardError: none has one.
    """
    told = [each for each in scored if each.tokens]
    if not told:
        raise SafeguardError(f"All {len(scored)} answers are empty, so they have no perplexity.")
    columns = [[each.nll for each in told], [float(each.tokens) for each in told]]
    return bootstrap(columns, lambda means: (means[:, 0] / means[:, 1]).exp())


def _sees(model: PreTrainedModel) -> bool:
    """Whether `model` is a vision-language model, whose language model has to be found first."""
    config = model.config
    return config.model_type in FAMILIES or getattr(config, "vision_config", None) is not None


def _log_probs(
    model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]
) -> list[torch.Tensor]:
    """(tokens,) log-probabilities of each answer behind its prompt under a causal model.

    Padded on the right, where no token of a causal model can see it.
    """
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).logits
    found = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        dtype = torch.promote_types(before.dtype, torch.float32)
        log_probs = before.to(dtype).log_softmax(-1)
        tokens = torch.tensor(answer, device=log_probs.device)
        found.append(log_probs.gather(-1, tokens[:, None])[:, 0])
    return found
