"""Where sentences end, learnt from a model's tokenizer and chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_safeguard.model.conversation import encode_messages, tokenizer_of, user_turn
from vlm_safeguard.model.generation_prompt import QUESTIONS
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.sentences import Sentences
from vlm_safeguard.policy.token_ids import same_start, shared_start

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_MARKS = ".!?…。！？｡؟۔।॥։።"  # what ends a sentence, in the world's scripts
_CLOSING = "\"'”’»)]}*_`」』）】"  # what may stand behind that and belongs to it


def learn_sentences(
    processor: ProcessorMixin, prompt: GenerationPrompt, shortest: int, most: int
) -> Sentences:
    """Read off which tokens end a sentence or a line, and what stands before a request.

    Args:
        shortest: see `Sentences`; `most`, likewise.
    """
    tokenizer = tokenizer_of(processor)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [token for token in range(len(tokenizer)) if token not in special]
    texts = tokenizer.batch_decode([[token] for token in ids])
    ends = frozenset(token for token, text in zip(ids, texts, strict=True) if _ends(text))
    opener = shared_start([encode_messages(processor, [user_turn(text)]) for text in QUESTIONS])
    if prompt.next_turn:  # what does not hang on a system prompt
        common = same_start(opener[::-1], prompt.next_turn[::-1])
        opener = opener[len(opener) - common :]
    return Sentences(ends, tuple(opener), shortest, most)


def _ends(text: str) -> bool:
    said = text.rstrip().rstrip(_CLOSING)
    return "\n" in text or said[-1:] in set(_MARKS)
