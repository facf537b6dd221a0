"""Guarded over unguarded time: prefill, decode step, whole answers; gate open and closed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from models import GATES, guard_for, load, requests_with, with_gate
from results import Cell, Sheet, in_turns, parser, told
from vlm_safeguard import Guard
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.images import blank_image
from vlm_safeguard.model.backbone import chat_inputs, model_inputs
from vlm_safeguard.model.conversation import Turn, chat_of
from vlm_safeguard.policy.response import Response
from vlm_safeguard.timing import Ratio, now

BATCHES = (1, 8)
ANSWERS = (32, 128)  # new tokens
AGAIN = "unguarded again"  # what differs there is noise
ALONE = "unguarded without images"  # what the closed gate's text pass cannot be shorter than
SYSTEM = Turn(
    "system",
    (
        "You help the customers of a shop for garden furniture. Answer in two or three friendly "
        "sentences, in the language of the question. Say what a thing is made of and how it is "
        "cared for, and name its price where you know it. Where you do not know something, say so, "
        "and give the number of the shop, which is open from nine to six on weekdays and until one "
        "on Saturdays. Never promise a delivery date.",
    ),
)
_MORE = 4  # prefills for every whole answer: they are short


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell that is not there yet, and show all."""
    asked = parser(__doc__, rounds=9).parse_args(argv)
    model, processor = load(asked.model)
    sheet = Sheet("speed", asked, model)
    fitted = guard_for(asked.model, model, processor)
    for size in BATCHES:
        for gate in GATES:
            guard = with_gate(asked.model, fitted, gate)
            texts = requests_with(model, processor, guard, gate, size)
            inputs = model_inputs(model, processor, texts, [blank_image()] * size)
            alone = model_inputs(model, processor, texts, [None] * size)
            measure(sheet, model, inputs, alone, guard, gate, asked.rounds)
            if gate == "open":
                measure_beside_text(sheet, model, inputs, alone, guard, asked.rounds)
            else:
                texts = requests_with(model, processor, guard, gate, size, before=(SYSTEM,))
                chats = [(SYSTEM, *chat_of(text, blank_image())) for text in texts]
                under = chat_inputs(model, processor, chats)
                measure_system(sheet, model, under, guard, asked.rounds)
                texts = requests_with(model, processor, guard, gate, size, sentences=2)
                inputs = model_inputs(model, processor, texts, [blank_image()] * size)
                measure_sentences(sheet, model, inputs, guard, asked.rounds)
    sheet.show()


def measure(
    sheet: Sheet, model: Any, inputs: Any, alone: Any, guard: Guard, gate: str, rounds: int
) -> None:
    """The cells of one batch under one state of the gate.

    Args:
        inputs: requests beside images.
        alone: the same without.
    """
    size, longest = len(inputs["input_ids"]), max(ANSWERS)
    guards = {
        "unguarded": None,
        AGAIN: None,
        "default": guard,
        "edit": guard.variant(response=Response.EDIT),
    }
    others = list(guards)[1:]

    def named(quantity: str, name: str) -> str:
        return f"{quantity}, {gate} gate, batch {size}, {name}"

    def runs(tokens: int) -> dict[str, Any]:
        return {n: partial(stamps, model, inputs, g, gate, tokens) for n, g in guards.items()}

    def keep(
        quantity: str, values: dict[str, list[float]], target: float | None, note: str = ""
    ) -> None:
        add_ratios(sheet, f"{quantity}, {gate} gate, batch {size}", values, target, note)

    if sheet.lacks(named("prefill", name) for name in (*others, ALONE)):
        share = text_share(model, inputs, guard)
        prefills = {**runs(1), ALONE: partial(stamps, model, alone, None, gate, 1)}
        found = in_turns(f"prefill, {gate} gate, batch {size}", prefills, _MORE * rounds)
        keep(
            "prefill",
            totals(found),
            1 + share + 0.03 if gate == "closed" else None,
            f"text is {share:.0%} of the prompt",
        )
    if sheet.lacks(named(f"{longest} tokens", name) for name in others):
        found = in_turns(f"{longest} tokens, {gate} gate, batch {size}", runs(longest), rounds)
        steps = {
            name: [median(after - before for before, after in pairwise(times)) for times in some]
            for name, some in found.items()
        }
        keep("decode step", steps, 1.00 if gate == "closed" else 1.02)
        for tokens in ANSWERS:
            whole = {name: [times[tokens - 1] for times in some] for name, some in found.items()}
            slower = 1.03 if model.device.type == "cuda" else 1.05
            keep(f"{tokens} tokens", whole, slower if tokens == 128 else None)


def measure_beside_text(
    sheet: Sheet, model: Any, inputs: Any, alone: Any, guard: Guard, rounds: int
) -> None:
    """The default's prefills and short answers over those to the same requests without images.

    Args:
        inputs: requests beside images, whose gates are open.
        alone: the same without, which are asked unguarded.
    """
    size, few = len(inputs["input_ids"]), ANSWERS[0]
    for name, tokens, count in (("prefill", 1, _MORE * rounds), (f"{few} tokens", few, rounds)):
        quantity = f"{name} over text alone, open gate, batch {size}"
        if not sheet.lacks([f"{quantity}, default"]):
            continue
        runs = {
            "text alone": partial(stamps, model, alone, None, "open", tokens),
            "default": partial(stamps, model, inputs, guard, "open", tokens),
        }
        add_ratios(sheet, quantity, totals(in_turns(quantity, runs, count)), 1.10)


def measure_system(sheet: Sheet, model: Any, inputs: Any, guard: Guard, rounds: int) -> None:
    """Prefills of requests under a system prompt, with closed gates, over the unguarded ones."""
    size = len(inputs["input_ids"])
    quantity = f"prefill under a system prompt, closed gate, batch {size}"
    if not sheet.lacks([f"{quantity}, default"]):
        return
    share = text_share(model, inputs, guard)
    guards = {"unguarded": None, "default": guard}
    runs = {n: partial(stamps, model, inputs, g, "closed", 1) for n, g in guards.items()}
    found = totals(in_turns(quantity, runs, _MORE * rounds))
    add_ratios(sheet, quantity, found, None, f"text is {share:.0%} of the prompt")


def measure_sentences(sheet: Sheet, model: Any, inputs: Any, guard: Guard, rounds: int) -> None:
    """Prefills of requests of two sentences, whose gates are closed, over the unguarded ones."""
    size = len(inputs["input_ids"])
    quantity = f"prefill of two sentences, closed gate, batch {size}"
    guards = {"unguarded": None, "default": guard, "texts whole": guard.variant(sentences=None)}
    if not sheet.lacks(f"{quantity}, {name}" for name in list(guards)[1:]):
        return
    runs = {n: partial(stamps, model, inputs, g, "closed", 1) for n, g in guards.items()}
    add_ratios(sheet, quantity, totals(in_turns(quantity, runs, _MORE * rounds)), None)


def totals(found: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Seconds to the last new token, of each run."""
    return {name: [last for *_, last in each] for name, each in found.items()}


def add_ratios(
    sheet: Sheet,
    quantity: str,
    values: dict[str, list[float]],
    target: float | None,
    note: str = "",
) -> None:
    """A cell for each of the others over the first; what shows the noise has no target."""
    over, *others = values
    took = f"{over} {1e3 * median(values[over]):.1f} ms"
    for name in others:
        sheet.add(
            Cell.ratio(
                f"{quantity}, {name}",
                Ratio.of(values[name], values[over]),
                None if name in (AGAIN, ALONE) else target,
                "; ".join(filter(None, (took, note))),
            )
        )


class Clock(StoppingCriteria):
    """Notes when each new token is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
        """See `StoppingCriteria`."""
        self.times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def stamps(model: Any, inputs: Any, guard: Guard | None, gate: str, tokens: int) -> list[float]:
    """Seconds from the call of `generate` to each new token.

    Attaching is not counted, nor is reading what the texts begin with, which the first request does
    for all that follow. The words that an answer is begun with are there together, with the first
    token.

    Raises:
        SafeguardError: the gate was not as it should have been.
    """
    clock = Clock()
    with nullcontext() if guard is None else guard.attach(model) as attached:
        if attached is not None and not attached.policy.edits:  # these read texts whole
            attached.judge(**inputs)
        start = now()
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    if guard is not None and {r.guarded for r in guard.receipts} != {gate == "open"}:
        raise SafeguardError(f"The gate was not {gate} for every request.")
    times = [time - start for time in clock.times]
    return times[:1] * (tokens - len(times)) + times


def text_share(model: Any, inputs: Any, guard: Guard) -> float:
    """Tokens of the text-only views over tokens of the prompts: what a second pass must cost."""
    with guard.attach(model):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return sum(r.text_tokens for r in guard.receipts) / int(inputs["attention_mask"].sum())


if __name__ == "__main__":
    told(main)
