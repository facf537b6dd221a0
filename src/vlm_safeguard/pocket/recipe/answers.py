"""Self-distillation: the base model's own answers to harmless requests, so it stays itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from vlm_safeguard.model.conversation import render_chat
from vlm_safeguard.pocket.requests import Phrase

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

_NEW_TOKENS = 16
_BATCH = 96


@torch.inference_mode()
def own_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    phrases: list[Phrase],
    path: Path,
) -> dict[str, str]:
    """The answer, cut at 16 tokens, to each phrase in one of its forms, by the phrase's text.

    It does not open with "I": that token is left to refusals, so that the first one tells.
    """
    if path.is_file():
        stored: dict[str, str] = json.loads(path.read_text("utf-8"))
        return stored
    rng = random.Random("answers")
    requests = [(phrase.text, phrase.request(rng)) for phrase in phrases]
    requests.sort(key=lambda pair: len(pair[1]))
    answers: dict[str, str] = {}
    for start in tqdm(range(0, len(requests), _BATCH), desc="answering harmless requests"):
        rows = requests[start : start + _BATCH]
        prompts = [render_chat(processor, request) for _, request in rows]
        inputs = processor(text=prompts, return_tensors="pt", padding=True)
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            begin_suppress_tokens=processor.tokenizer.encode("I"),
            suppress_tokens=[processor.image_token_id],
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        for (text, _), ids in zip(rows, new, strict=True):
            answer = processor.tokenizer.decode(ids, skip_special_tokens=False)
            whole, end, _ = answer.partition("<|im_end|>")  # what follows is padding
            answers[text] = whole + end
    path.write_text(json.dumps(answers, indent=0), "utf-8")
    return answers
