"""Self-distillation: the base model's own answers to harmless requests, so it stays itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import track

from vlm_safeguard.pocket.requests import Phrase

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

_NEW_TOKENS = 24
_BATCH = 96
PHRASINGS = 2  # forms of each phrase that are answered


def conversation(request: str, system: str | None = None) -> list[dict[str, str]]:
    """A one-turn text conversation in the chat template's form."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": request}]


@torch.inference_mode()
def own_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    phrases: list[Phrase],
    path: Path,
) -> dict[str, list[tuple[str, str]]]:
    """For each phrase's text, `PHRASINGS` pairs of (request, answer cut at 24 tokens)."""
    if path.is_file():
        stored = json.loads(path.read_text("utf-8"))
        return {text: [(q, a) for q, a in pairs] for text, pairs in stored.items()}
    rng = random.Random("answers")
    asked = [(p.text, p.request(rng)) for p in phrases for _ in range(PHRASINGS)]
    asked.sort(key=lambda pair: len(pair[1]))
    found: dict[str, list[tuple[str, str]]] = {}
    for start in track(range(0, len(asked), _BATCH), "answering harmless requests"):
        rows = asked[start : start + _BATCH]
        prompts = [
            processor.apply_chat_template(conversation(request), add_generation_prompt=True)
            for _, request in rows
        ]
        inputs = processor(text=prompts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        for (text, request), ids in zip(rows, new, strict=True):
            answer = processor.tokenizer.decode(ids, skip_special_tokens=False)
            found.setdefault(text, []).append((request, answer.split("<|im_end|><|im_end|>")[0]))
    path.write_text(json.dumps(found, indent=0), "utf-8")
    return found
