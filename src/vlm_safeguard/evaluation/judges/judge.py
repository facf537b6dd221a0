"""A judge that is a language model: what it is asked, how its reply is read, and asking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import BatchFeature

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.rendering import longest, opens_itself, render_chats
from vlm_safeguard.evaluation.judges.verdict import UnreadableError, Verdict
from vlm_safeguard.model.backbone import input_device
from vlm_safeguard.model.conversation import Chat
from vlm_safeguard.model.vlm import VLM, LanguageModel

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Judge:
    """A form of question and answer that many models know.

    Attributes:
        messages: (request, answer, image or None) → what the model is asked.
        parse: the model's reply → the verdict; raises `UnreadableError`.
        max_new_tokens: enough for the longest reply of this form.
    """

    name: str
    messages: Callable[[str, str, Image | None], Chat]
    parse: Callable[[str], Verdict]
    max_new_tokens: int

    @torch.inference_mode()
    def judge(
        self,
        answerer: VLM | LanguageModel,
        requests: Sequence[str],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        *,
        batch_size: int = 8,
    ) -> list[Verdict]:
        """Verdicts of a local model, decoded greedily, in the order of the requests.

        What cannot be read is a verdict without a word (`Verdict.readable` is False) whose note
        says why.

        Args:
            images: one a request or None; only for a model that takes them.

        Raises:
            SafeguardError: images for a model that takes none, or a chat template that does not
                hold what is to be judged.
        """
        shown = [None] * len(requests) if images is None else list(images)
        if any(shown) and isinstance(answerer, LanguageModel):
            raise SafeguardError(
                "This judge reads text only: give it no images, or take a model that sees them "
                "(Llama Guard 3 Vision or 4) with its processor."
            )
        texts = render_chats(
            answerer.processor,
            [self.messages(*of) for of in zip(requests, answers, shown, strict=True)],
        )
        tokenizer = answerer.tokenizer
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        room = longest(answerer.model) - self.max_new_tokens
        verdicts = {
            i: _unreadable(f"{length} tokens, and the judge has room for {room}")
            for i, length in enumerate(lengths)
            if length > room
        }
        for seen in (False, True):  # processors take images for all of a batch or for none
            rows = [
                i for i in range(len(texts)) if i not in verdicts and (shown[i] is not None) is seen
            ]
            rows.sort(key=lambda i: lengths[i])
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                batch_images = [image for i in batch if (image := shown[i]) is not None]
                replies = _replies(
                    answerer, [texts[i] for i in batch], batch_images, self.max_new_tokens
                )
                verdicts |= dict(zip(batch, map(self._read, replies), strict=True))
        return [verdicts[i] for i in range(len(texts))]

    def _read(self, reply: str) -> Verdict:
        try:
            return self.parse(reply)
        except UnreadableError as error:
            return _unreadable(str(error))


def _unreadable(why: str) -> Verdict:
    return Verdict(refused=None, unsafe=None, note=f"unreadable: {why}")


def _replies(
    answerer: VLM | LanguageModel,
    texts: list[str],
    images: list[Image],
    max_new_tokens: int,
) -> list[str]:
    """Greedy replies to rendered conversations, one image each or none at all."""
    model, tokenizer = answerer.model, answerer.tokenizer
    if tokenizer.pad_token is None:  # Llama 2's has none; what pads is masked out
        tokenizer.pad_token = tokenizer.eos_token
    encoded = answerer.processor(
        text=texts,
        **({"images": [[image] for image in images]} if images else {}),
        add_special_tokens=not opens_itself(tokenizer, texts[0]),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    inputs = BatchFeature(dict(encoded)).to(input_device(model), model.dtype)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a checkpoint's own would keep it from giving a grade twice
        pad_token_id=tokenizer.pad_token_id,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    replies: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return replies
