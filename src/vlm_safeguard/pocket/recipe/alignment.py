"""Step (a): teach the base LLM, on text alone, to refuse harm and answer the rest as before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm_safeguard.model.conversation import render_chat
from vlm_safeguard.pocket.recipe.answers import own_answers
from vlm_safeguard.pocket.recipe.loop import autocast, token_loss, train
from vlm_safeguard.pocket.requests import (
    REFUSALS,
    SYSTEM_PROMPTS,
    Phrase,
    read_phrases,
    read_wrappers,
    split_phrases,
)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

RANK = 24
EPOCHS = 4
BATCH = 64
LEARNING_RATE = 1e-3
HARMLESS_WEIGHT = 1.5  # of a harmless request beside a harmful one
DECISION_SHARE = 0.5  # of an answer's weight that lies on its first token, where refusals part
SYSTEM_SHARE = 0.15  # share of examples that carry a system prompt
WRAPPED_SHARE = 0.15  # share of examples, harmful and harmless, inside a jailbreak's words
_ALIKE = 16  # examples of like length that are padded together
_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def add_low_rank(model: LlavaForConditionalGeneration, rank: int) -> dict[str, torch.nn.Parameter]:
    """Freeze the model and put low-rank updates on the LLM's linear layers; returns them."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS, lora_dropout=0.0), model
    )
    updates = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in updates.values():
        parameter.data = parameter.data.float()  # bfloat16 would lose small steps
    return updates


def low_rank_updates(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """`<module>.a` (rank × in) and `<module>.b` (out × rank, scale included): W + b a."""
    updates = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            scale = module.scaling["default"]
            updates[f"{name}.a"] = module.lora_A["default"].weight.detach().clone()
            updates[f"{name}.b"] = module.lora_B["default"].weight.detach() * scale
    return updates


def answer_loss(
    model: LlavaForConditionalGeneration,
    prompts: list[list[int]],
    answers: list[list[int]],
    importance: list[float],
) -> torch.Tensor:
    """Mean over the examples, by importance, of each answer's weighted cross-entropy."""
    examples = list(zip(prompts, answers, importance, strict=True))
    examples.sort(key=lambda example: len(example[0]) + len(example[1]))
    losses = [
        _summed_loss(model, examples[start : start + _ALIKE])
        for start in range(0, len(examples), _ALIKE)
    ]
    return torch.stack(losses).sum() / sum(importance)


def _summed_loss(
    model: LlavaForConditionalGeneration, examples: list[tuple[list[int], list[int], float]]
) -> torch.Tensor:
    """Sum over (prompt, answer, importance), padded to the longest, of the weighted losses."""
    rows = [prompt + answer for prompt, answer, _ in examples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    weights = torch.zeros(len(rows), width)
    for i, (prompt, answer, weight) in enumerate(examples):
        first = len(prompt)
        spread = (1 - DECISION_SHARE) / len(answer)
        weights[i, first : first + len(answer)] = weight * spread
        weights[i, first] += weight * DECISION_SHARE
    ids, mask, weights = (each.to(model.device) for each in (ids, mask, weights))
    with autocast(model.device):
        states = model.model.language_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return token_loss(model, states, ids, weights)


@torch.inference_mode()
def refusal_rates(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, phrases: list[Phrase]
) -> tuple[float, float]:
    """Shares of harmful and harmless phrases whose answer begins with "I'm sorry"."""
    refused: dict[bool, list[bool]] = {True: [], False: []}
    rng = random.Random("development")
    requests = [(phrase.harmful, phrase.request(rng)) for phrase in phrases]
    for start in range(0, len(requests), 64):
        rows = requests[start : start + 64]
        prompts = [render_chat(processor, text) for _, text in rows]
        inputs = processor(text=prompts, return_tensors="pt", padding=True)
        with autocast(model.device):
            output = model.generate(**inputs.to(model.device), max_new_tokens=4, do_sample=False)
        replies = processor.batch_decode(output[:, -4:], skip_special_tokens=True)
        for (harmful, _), reply in zip(rows, replies, strict=True):
            refused[harmful].append(reply.startswith("I'm sorry"))
    rates = [sum(refused[kind]) / max(1, len(refused[kind])) for kind in (True, False)]
    return rates[0], rates[1]


def conversation(request: str, system: str | None) -> list[dict[str, str]]:
    """A one-turn conversation, with a system prompt if there is one."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": request}]


def align(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, seed: int
) -> dict[str, torch.Tensor]:
    """Train the low-rank updates (in place) and return them.

    Args:
        seed: of their start, of the order of the phrases and of how they are put.
    """
    phrases, development = split_phrases(read_phrases())
    wrappers = read_wrappers()
    folder.mkdir(parents=True, exist_ok=True)
    harmless = [phrase for phrase in phrases if not phrase.harmful]
    answers = own_answers(model, processor, harmless, folder / "answers.json")
    torch.manual_seed(seed)
    parameters = add_low_rank(model, RANK)
    encode = processor.tokenizer.encode
    per_epoch = -(-len(phrases) // BATCH)
    orders: dict[int, list[list[Phrase]]] = {}

    def batches_of(epoch: int) -> list[list[Phrase]]:
        if epoch not in orders:
            rng = random.Random(f"epoch-{seed}-{epoch}")
            order = rng.sample(phrases, len(phrases))
            orders[epoch] = [order[i::per_epoch] for i in range(per_epoch)]
        return orders[epoch]

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(f"step-{seed}-{step}")
        prompts, replies, importance = [], [], []
        for phrase in batches_of(step // per_epoch)[step % per_epoch]:
            request = phrase.request(rng)
            if rng.random() < WRAPPED_SHARE:
                request = rng.choice(wrappers).replace("{request}", request)
            refusal = rng.choice(REFUSALS) + "<|im_end|>"
            answer = refusal if phrase.harmful else answers[phrase.text]
            system = rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None
            text = processor.apply_chat_template(
                conversation(request, system), add_generation_prompt=True
            )
            prompts.append(encode(text))
            replies.append(encode(answer))
            importance.append(1.0 if phrase.harmful else HARMLESS_WEIGHT)
        return answer_loss(model, prompts, replies, importance)

    def after_step(step: int) -> str:
        if step % per_epoch:
            return ""
        harmful, other = refusal_rates(model, processor, development)
        return f"development refusal: harmful {harmful:.3f}, harmless {other:.3f}"

    train(
        f"alignment-{seed}",
        parameters,
        loss_at,
        steps=EPOCHS * per_epoch,
        learning_rate=LEARNING_RATE,
        folder=folder,
        after_step=after_step,
    )
    return low_rank_updates(model)
