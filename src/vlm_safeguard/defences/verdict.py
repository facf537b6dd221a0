"""A model's yes or no to a question, read off the first token that it would answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.model.conversation import Chat

if TYPE_CHECKING:
    from vlm_safeguard.model.vlm import VLM


def yes_log_odds(vlm: VLM, questions: Sequence[Chat]) -> torch.Tensor:
    """Log p(yes) − log p(no) of the answer's first token; above 0 the model says yes.

    Args:
        questions: conversations that end with a question for yes or no.

    Returns:
        (questions,) float32, on the CPU.

    Raises:
        SafeguardError: the tokenizer begins "yes" and "no" with the same token.
    """
    yes, no = _first_tokens(vlm, "yes"), _first_tokens(vlm, "no")
    if not yes - no or not no - yes:
        raise SafeguardError('This tokenizer cannot tell "yes" from "no" by the first token.')
    output = vlm.model.generate(
        **vlm.encode(questions),
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits: torch.Tensor = output.logits[0].float().cpu()
    return logits[:, list(yes - no)].logsumexp(-1) - logits[:, list(no - yes)].logsumexp(-1)


def _first_tokens(vlm: VLM, word: str) -> set[int]:
    """First tokens of a word, in either case, with a space before it or without."""
    tokenizer = vlm.tokenizer
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    return {tokenizer.encode(form, add_special_tokens=False)[0] for form in forms}
