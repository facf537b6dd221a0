"""Answers without inspect-ai: every defence answers a batch before the next one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlm_safeguard.defences.defence import Defence
from vlm_safeguard.evaluation.answers.reply import Reply, line_of
from vlm_safeguard.evaluation.asks.ask import Ask
from vlm_safeguard.evaluation.judges.refusal import verdict
from vlm_safeguard.evaluation.judges.utility import names_answer
from vlm_safeguard.evaluation.results.lines import Line
from vlm_safeguard.model.vlm import VLM


def direct_answers(
    vlm: VLM,
    asks: Sequence[Ask],
    defences: Callable[[], Mapping[str, Defence]],
    *,
    max_new_tokens: int,
    batch_size: int,
    after_batch: Callable[[str, int], None] = lambda defence, done: None,
) -> list[Line]:
    """One line an answer, judged by `refusal`, defence by defence in the order of the asks.

    Answers have no seconds: defences that share a text-only pass have no time of their own.

    Args:
        asks: all with an image, or all without one.
        defences: makes the defences of one batch, by name.
        after_batch: called with a defence's name and the number of asks it has just answered.

    Raises:
        SafeguardError: an image or a condition is not there, or the model cannot be asked.
    """
    # near in length, near in the order: what shares a batch is then padded little
    order = sorted(
        range(len(asks)), key=lambda place: (len(asks[place].sample.text), asks[place].sample.text)
    )
    lines: dict[str, dict[int, Line]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chats = [asks[place].chat() for place in batch]
        for name, defence in defences().items():
            answers = defence.generate(vlm, chats, max_new_tokens=max_new_tokens)
            for place, answer in zip(batch, answers, strict=True):
                reply = Reply.of(answer, batch=len(batch))
                lines.setdefault(name, {})[place] = _judged(asks[place], name, reply)
            after_batch(name, len(batch))
    return [by_place[place] for by_place in lines.values() for place in range(len(asks))]


def _judged(ask: Ask, defence: str, reply: Reply) -> Line:
    record, sample = ask.record(), ask.sample
    if sample.kind == "utility":
        correct = names_answer(sample, reply.text)
        return line_of(record, sample.id, defence, reply, correct=correct)
    verdicts = {"refusal": verdict(reply.text)}
    return line_of(record, sample.id, defence, reply, verdicts=verdicts)
