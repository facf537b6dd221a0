"""A language model that sees nothing, as a judge is: conversations of text in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_safeguard.defences.defence import Answer, decoded
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.rendering import opens_itself, render_chats
from vlm_safeguard.model.backbone import input_device
from vlm_safeguard.model.conversation import Chat, images_of

if TYPE_CHECKING:
    from vlm_safeguard.model.vlm import LanguageModel


def text_answers(language: LanguageModel, chats: Sequence[Chat], **options: Any) -> list[Answer]:
    """Answers to one batch of conversations, greedy unless the options say otherwise.

    Raises:
        SafeguardError: a conversation holds an image, or the tokenizer cannot write it.
    """
    model, tokenizer = language.model, language.tokenizer
    if any(images_of(chat) for chat in chats):
        raise SafeguardError(
            f"{model.name_or_path or type(model).__name__} takes no images, and the conversation "
            "holds one."
        )
    rendered = render_chats(tokenizer, chats)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(
        rendered,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not opens_itself(tokenizer, rendered[0]),
    ).to(input_device(model))
    # a checkpoint's own repetition penalty would keep a judge from giving a grade twice
    options = {
        "do_sample": False,
        "repetition_penalty": 1.0,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options
    )
    return decoded(language, output[:, inputs["input_ids"].shape[1] :], **options)
