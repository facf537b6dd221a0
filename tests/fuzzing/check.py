"""What has to hold of every case, whatever it is."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, set_seed

import vlm_safeguard
from fuzzing.by_hand import answer_start, edited, row_by_hand
from fuzzing.cases import (
    ANSWER,
    IMAGE,
    Case,
    Guarding,
    looked_at,
    masked,
    padded,
    pixels_of,
    shaped,
)
from fuzzing.models import sentences
from fuzzing.options import REFUSED, UNKNOWN, made
from support.observe import Model, Watch, hooks
from support.reference import text_reading
from vlm_safeguard.engines.hooks.door import OTHER_DOORS
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.policy.gate import GATES, AnyCriterion, ImageScore, TextScore
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.policy import Policy
from vlm_safeguard.policy.receipt import Receipt
from vlm_safeguard.policy.response import Response

OURS = str(Path(vlm_safeguard.__file__).parent)
DOORS = {"generate", "prepare_inputs_for_generation", "get_compiled_call", *OTHER_DOORS}
WORDS = (20, 21, 22)  # of refusals
BUDGET: dict[str, Any] = {"budget": 0.1, "calibrated_on": 20}


@dataclass
class Call:
    """One `generate`, and what came of it."""

    ids: Any
    mask: Tensor | None
    output: Any = None
    error: Exception | None = None
    receipts: list[Receipt] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    images_again: bool = False  # of a chat whose last answer left no cache

    @property
    def sequences(self) -> Tensor:
        """(rows, tokens) ids."""
        out = self.output if isinstance(self.output, Tensor) else self.output.sequences
        assert isinstance(out, Tensor)
        return out


def guard_of(guarding: Guarding, fitted: Guard) -> Guard:
    layers, edit, chosen, has_words, response, *_ = guarding
    reads = fitted.policy.criterion(TextScore)
    assert reads is not None
    gate: tuple[AnyCriterion, ...]
    if isinstance(chosen, str) and chosen in GATES:
        gate = GATES[chosen]
    else:
        text, image = (reads.threshold, 100.0) if isinstance(chosen, str) else chosen
        made_of: list[AnyCriterion] = [reads.model_copy(update={"threshold": text})]
        if image is not None:
            made_of.append(ImageScore(layer=layers[0], threshold=image, **BUDGET))
        if guarding.refuses:
            made_of.insert(0, OwnRefusal(layers=reads.layers, **guarding.refuses._asdict()))
        gate = tuple(made_of)
    prefix = WORDS if has_words else ()
    return fitted.variant(
        layers=layers,
        edit=edit,
        gate=gate,
        refusal_prefix=prefix,
        response=response,
        sentences=sentences() if guarding.parts else None,
    )


def hooked(model: Any) -> dict[str, Any]:
    """Every hook, and the ways into a model that it has of its own."""
    return {
        "own": sorted(vars(model).keys() & DOORS),
        **{
            f"{name} {kind}": ids
            for name, kinds in hooks(model).items()
            for kind, ids in kinds.items()
            if ids
        },
    }


# --- calls ---


def answer(case: Case, generate: Callable[..., Any], last: Call | None = None) -> Call:
    """The case's call, or the one of its second turn, after `last`."""
    options = made(case.options)
    if last is None:
        rows, pads = case.prompts, case.pads
    else:
        rows, pads = _grown(case, last), 0
    ids, mask = padded(rows, pads)
    pixels = pixels_of(rows)
    cached = last is not None and case.following is not None and case.following.cached
    if cached:
        assert last is not None
        cache = options["past_key_values"] = last.output.past_key_values
        if cache is not None:  # an answer from the text leaves none: all images are given again
            pixels = pixels_of([row[last.sequences.shape[1] :] for row in rows])
        before = last.mask if last.mask is not None else torch.ones_like(last.ids)
        before = before.repeat_interleave(len(rows) // len(before), 0)
        grown = torch.ones(len(rows), ids.shape[1] - before.shape[1], dtype=torch.long)
        mask = torch.cat([before, grown], 1)
    call = Call(shaped(ids, case.ids), masked(mask, case.mask))
    call.images_again = cached and options["past_key_values"] is None
    if case.following is not None and last is None:
        options["return_dict_in_generate"] = True
    options["logits_processor"] = [call.watch, *options.get("logits_processor", [])]
    if case.streamed:
        options["streamer"] = call.watch
    in_config = {name: options.pop(name) for name in case.in_config if name in options}
    in_config.pop("logits_processor", None)
    positional: tuple[Any, ...] = ()
    if case.ids == "positional":
        positional = (call.ids,)
    else:
        options["inputs" if case.ids == "inputs" else "input_ids"] = call.ids
    if call.mask is not None:
        options["attention_mask"] = call.mask
    if (shown := looked_at(pixels, case.pixels)) is not None:
        options["pixel_values"] = shown
    set_seed(case.seed)
    try:
        if in_config:
            options["generation_config"] = GenerationConfig(**in_config)
        call.output = generate(*positional, **options)
    except Exception as error:
        call.error = error
    return call


def _grown(case: Case, last: Call) -> list[list[int]]:
    """Each row's conversation with the answer that it got and what is asked next."""
    assert case.following is not None
    rows = last.sequences.tolist()
    asked = case.following.prompts
    if case.following.cached:
        return [[*row, *asked[0]] for row in rows]
    copies = max(len(rows) // len(asked), 1)
    pads = [len(row) - len(case.prompts[i // copies]) for i, row in enumerate(last.ids.tolist())]
    return [
        [*row[pads[i // copies] if i // copies < len(pads) else 0 :], *asked[i // copies]]
        for i, row in enumerate(rows)
    ]


def turns(case: Case, generate: Callable[..., Any], around: Callable[[int], Any]) -> list[Call]:
    """All turns of a case, each in the context that `around` gives for it."""
    calls: list[Call] = []
    for number in range(1 if case.following is None else 2):
        with around(number):
            calls.append(answer(case, generate, calls[-1] if calls else None))
        if calls[-1].error is not None or case.ids not in ("keyword", "inputs", "positional"):
            break
    return calls


# --- what has to hold ---


def check(case: Case, model: Model, fitted: Guard) -> str:
    """Run a case.

    Returns:
        What came of it, in a few words.

    Raises:
        AssertionError: something does not hold.
    """
    guard = guard_of(case.guarding, fitted)
    state = hooked(model)
    with guard.attach(model) as attachment:
        calls: list[Call] = []

        def generate(*args: Any, **options: Any) -> Any:
            if case.way == "model":
                out = model.generate(*args, **options)
                receipts.append(guard.receipts)
            else:
                out, given = attachment.generate(*args, **options)
                receipts.append(given)
            return out

        receipts: list[list[Receipt]] = []
        calls = turns(case, generate, lambda number: nullcontext())
    for call, given in zip(calls, receipts, strict=False):
        call.receipts = given
    assert hooked(model) == state, "leaving the block did not leave the model as it was"
    free: list[Call] = []
    if not isinstance(calls[0].error, SafeguardError):
        free = turns(case, model.generate, lambda number: nullcontext())
    if calls[0].error is None:
        _check_gate(case, guard, model, calls[0])
    outcome = ""
    for number, call in enumerate(calls):
        outcome = _check_call(case, guard, call, free[number] if number < len(free) else None)
        if call.error is not None:
            return outcome
    if guard.policy.edits:
        return _check_by_hand(case, guard, model, calls) or outcome
    return _check_texts(case, guard, model, calls[0]) or outcome


def _check_gate(case: Case, guard: Guard, model: Model, call: Call) -> None:
    """It is open where the text or one of its sentences opens it, read one by one by the model."""
    policy, criteria = guard.policy, guard.policy.gate
    text_alone = criteria and all(isinstance(c, TextScore | OwnRefusal) for c in criteria)
    if not text_alone or call.mask is None or case.mask in ("holes", "right"):
        return
    copies = len(call.receipts) // len(call.ids)
    rows = zip(call.ids.tolist(), call.mask.bool().tolist(), strict=True)
    for number, (ids, keep) in enumerate(rows):
        prompt = [token for token, kept in zip(ids, keep, strict=True) if kept]
        asked = answer_start(prompt)
        if prompt[asked - len(ANSWER) : asked] != ANSWER:
            continue
        text = [token for token in prompt[:asked] if token != IMAGE[0]]
        opens = (policy.guards_text or IMAGE[0] in prompt) and any(
            _opens(policy, model, each, place > 0)
            for place, each in enumerate(policy.judged(tuple(text)))
        )
        for receipt in call.receipts[number * copies : (number + 1) * copies]:
            assert receipt.guarded == opens, f"row {number}: by hand its gate is open: {opens}"


@torch.no_grad()
def score(policy: Policy, model: Model, text: Sequence[int], layers: Sequence[int]) -> float:
    """A text's mean harm score in these layers."""
    states = text_reading(model, text)
    scores = [policy.directions.harm_score(states[n][-1:], n) for n in layers]
    return float(torch.stack(scores).mean())


@torch.no_grad()
def _opens(policy: Policy, model: Model, text: Sequence[int], alone: bool) -> bool:
    """Whether a text, or a sentence alone, opens the gate."""
    logits = model(input_ids=torch.tensor([list(text)])).logits[0, -1]
    opens = False
    for criterion in policy.gate:
        assert isinstance(criterion, TextScore | OwnRefusal)
        found = score(policy, model, text, criterion.layers)
        if isinstance(criterion, TextScore):
            opens |= found > criterion.threshold
            continue
        refuses = int(logits.argmax()) in criterion.tokens
        if alone:
            opens |= refuses and found > (torch.inf if (a := criterion.alone_above) is None else a)
            continue
        floor = -torch.inf if criterion.score_floor is None else criterion.score_floor
        anyhow = found > criterion.score_above
        usual = found > floor and _lead(model, text, policy.refusal_prefix) > -criterion.slack
        opens |= refuses and (anyhow or usual)
    return opens


@torch.no_grad()
def _lead(model: Model, text: Sequence[int], words: Sequence[int]) -> float:
    """The least lead of a word over all others, of those that follow a text; none lead by much."""
    leads = [torch.inf]
    for place, word in enumerate(words):
        (logits,) = model(input_ids=torch.tensor([[*text, *words[:place]]])).logits[:, -1]
        others = logits.clone()
        others[word] = -torch.inf
        leads.append(float(logits[word] - others.max()))
    return min(leads)


def _check_call(case: Case, guard: Guard, call: Call, free: Call | None) -> str:
    """Of one call beside the same one without a guard."""
    error = call.error
    if isinstance(error, SafeguardError):
        # else closed rows are answered first, or drafts are weighed before any pass
        counted = guard.policy.edits and "prompt_lookup_num_tokens" not in case.options
        steps = call.watch.steps if counted else 0
        assert steps == 0, f"refused after {steps} steps: {error}"
        assert not call.watch.streamed, "refused after a token was streamed"
        return f"refused: {_head(str(error))}"
    if error is not None:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        shown = "".join(traceback.format_exception(error)[-4:])
        assert not innermost.startswith(OURS), f"a bare error of ours:\n{shown}"
        assert free is None or type(free.error) is type(error), (
            f"the library's own error, but not without a guard ({free.error!r}):\n{shown}"
        )
        return f"the library refuses: {type(error).__name__}"
    for name in case.options:
        assert name not in REFUSED, f"{name} was let in"
        known = name in case.in_config or name not in UNKNOWN  # no config's other fields are read
        assert known, f"{name} was let in"
    rows = len(call.ids)
    assert call.receipts, "no receipt"
    assert len(call.receipts) % rows == 0, f"{len(call.receipts)} receipts of {rows} rows"
    copies = len(call.receipts) // rows
    for number, receipt in enumerate(call.receipts):
        images = call.ids[number // copies].tolist().count(4) // len(IMAGE)
        assert receipt.images == images, f"{receipt.images} images of {images}"
    if len(call.sequences) == 1 and case.streamed:
        written = call.sequences[0, call.ids.shape[1] :].tolist()
        assert call.watch.streamed == written, f"{call.watch.streamed} was streamed of {written}"
    if free is not None and free.error is None:
        _check_closed_rows(case, call, free)
    return "answered"


def _check_closed_rows(case: Case, call: Call, free: Call) -> None:
    """They are those of the unguarded model, bit for bit."""
    if call.ids.shape != free.ids.shape or call.images_again != free.images_again:
        return  # in the second case the images' noise is another
    ours, theirs = call.sequences, free.sequences
    all_closed = not any(receipt.guarded for receipt in call.receipts)
    ends = {"eos_token_id", "forced_eos_token_id", "stop_strings", "stopping_criteria"}
    if not all_closed and case.options.get("num_beams", 1) > 1 and ends & case.options.keys():
        return  # when beams end depends on the other rows'
    for number in range(len(ours)):
        receipt = call.receipts[number * len(call.receipts) // len(ours)]
        row = number * len(call.ids) // len(ours)
        if receipt.guarded or not torch.equal(call.ids[row], free.ids[row]):
            continue
        length = min(ours.shape[1], theirs.shape[1])
        assert torch.equal(ours[number, :length], theirs[number, :length]), (
            f"closed row {number} differs from the unguarded one"
        )
        assert not all_closed or ours.shape == theirs.shape, "closed, and of another length"


def _check_by_hand(case: Case, guard: Guard, model: Model, calls: list[Call]) -> str | None:
    """The tokens are those of a plain edit of the rows that were opened."""
    if case.mask in ("holes", "right", "none") or case.ids == "no row":
        return None
    masks = [call.mask for call in calls]

    def around(number: int) -> Any:
        call, mask = calls[number], masks[number]
        assert mask is not None
        rows = [
            row_by_hand(model, guard, row, keep)
            for row, keep in zip(call.ids.tolist(), mask.bool().tolist(), strict=True)
        ]
        return edited(model, guard, rows, call.ids.shape[1], call.receipts)

    by_hand = turns(case, model.generate, around)
    assert len(by_hand) == len(calls)
    prefix = guard.policy.refusal_prefix
    for ours, theirs in zip(calls, by_hand, strict=True):
        assert theirs.error is None, f"by hand: {theirs.error!r}"
        width = ours.ids.shape[1]
        starts = {tuple(row[width:])[:1] for row in ours.sequences.tolist()}
        if prefix and (prefix[:1] in starts or prefix[0] in ours.ids.tolist()[0]):
            return "answered, as the opening of a refusal"  # other tests know what is edited then
        assert torch.equal(ours.sequences, theirs.sequences), (
            f"{ours.sequences.tolist()} where by hand it is {theirs.sequences.tolist()}"
        )
    opened = any(receipt.guarded for call in calls for receipt in call.receipts)
    return f"answered as by hand, {'some gate open' if opened else 'closed'}"


#: Under which a greedy answer is the same whatever stands in the prompt beside its text.
_PLAIN = {
    "max_new_tokens",
    "use_cache",
    "return_dict_in_generate",
    "output_logits",
    "output_scores",
}


def _check_texts(case: Case, guard: Guard, model: Model, call: Call) -> str | None:
    """Open rows are answered as the model answers their texts, asked one by one."""
    plain = case.options.keys() <= _PLAIN and not case.in_config and case.following is None
    if not plain or call.mask is None or case.mask == "holes":
        return None
    beginning = guard.policy.refusal_prefix if guard.policy.response is Response.REFUSAL else ()
    if beginning and case.options.get("max_new_tokens", 0) < 1:
        return None
    opened = 0
    for number, (ids, keep, receipt) in enumerate(
        zip(call.ids.tolist(), call.mask.bool().tolist(), call.receipts, strict=True)
    ):
        prompt = [token for token, kept in zip(ids, keep, strict=True) if kept]
        if not receipt.guarded or prompt[-len(ANSWER) :] != ANSWER:
            continue
        opened += 1
        begun = list(beginning[: case.options.get("max_new_tokens", 0) - 1])
        text = torch.tensor([[token for token in prompt if token != IMAGE[0]] + begun])
        asked = {"attention_mask": torch.ones_like(text), **case.options}
        if begun:
            asked["max_new_tokens"] -= len(begun)
        alone = model.generate(input_ids=text, **asked)
        alone = alone if isinstance(alone, Tensor) else alone.sequences
        ours = call.sequences[number, len(ids) :].tolist()
        theirs = alone[0, text.shape[1] - len(begun) :].tolist()
        assert ours == theirs, f"row {number}: {ours} where its text alone gives {theirs}"
    return f"answered from the text, {'some gate open' if opened else 'closed'}"


def _head(sentence: str) -> str:
    return re.sub(r"\d+", "N", sentence)[:70]
