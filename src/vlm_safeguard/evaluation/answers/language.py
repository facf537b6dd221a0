"""A language model that sees nothing, as a judge is: conversations of text in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_safeguard.defences.defence import Answer, until_end
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.answers.rendering import opens_itself, render_chats
from vlm_safeguard.model.conversation import Chat, pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def text_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Chat],
    **options: Any,
) -> list[Answer]:
    """Answers to one batch of conversations, greedy unless the options say otherwise.

    Raises:
        SafeguardError: a conversation holds a picture, or the tokenizer cannot write it.
    """
    if any(pictures(chat) for chat in chats):
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
    ).to(model.device)
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
    rows = [until_end(model, row, **options) for row in output[:, inputs["input_ids"].shape[1] :]]
    return [Answer(tokenizer.decode(row, skip_special_tokens=True), len(row)) for row in rows]
