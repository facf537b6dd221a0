"""Fail closed, proven: every fault of attaching and of a pass, and that nothing comes of it.

For each fault one helper, `fails_closed`, asserts four things: an error that names it (or the
error itself, where one is thrown in the model's code); no token chosen after it, none streamed,
no output; the model as it was, hooks, attributes and logits; and that a guard attaches again.

What cannot be told from inside the guarded process, and so is not refused:

- code that runs after the guard's hooks and writes other states over the edit, from a hook added
  while attached (a hook that was there before is found out by the canary);
- a hook on the model, added while attached, that swaps `input_ids` after the guard has read them;
- the decoder's own hook removed and the decoder then called directly: no code of the guard runs;
- the model's post-hook removed within a plain `forward`: this pass is guarded but not checked, the
  next one is refused (`generate` withholds its output);
- NaN that the model makes after the last guarded layer, or in a closed row: the model's own output;
- `get_decoder` overwritten after attaching: the guard goes on with the decoder that it found, which
  still runs;
- means or drift that are finite but wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlavaProcessor

from support.observe import Model, Watch, answer, hooks, step
from support.reference import QUESTIONS, ask, small_guard, spanning, with_thresholds
from tiny.pocket import make_model
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.backbone import Backbone
from vlm_safeguard.model.fingerprint import EmbeddingSample
from vlm_safeguard.policy.criterion import Criterion
from vlm_safeguard.policy.edits import Project, Refuse, Restore
from vlm_safeguard.policy.gate import GATES, ImageScore, TextScore
from vlm_safeguard.policy.span import Span

Spoil = Callable[[Model, ExitStack], Any]
NAN, INF = float("nan"), float("inf")
CLOSED = 1e9  # a threshold that no score passes
TEXT, IMAGE, DECODE = 1, 2, 3  # which pass through the decoder, counted from attaching


class InjectedError(Exception):
    """What other code throws."""


@dataclass(frozen=True)
class Sound:
    """What a sound model and a sound guard give for one batch."""

    inputs: dict[str, Tensor]
    guard: Guard
    free: Tensor
    guarded: Tensor


@pytest.fixture(scope="module")
def sound(model: Model, processor: LlavaProcessor, guard: Guard) -> Sound:
    inputs = ask(processor, QUESTIONS[:2])
    opened = guard.variant(gate=GATES["open"])
    free = answer(model, inputs, max_new_tokens=1)
    with opened.attach(model):
        guarded = answer(model, inputs, max_new_tokens=1)
    assert not torch.equal(torch.stack(free.logits), torch.stack(guarded.logits))
    return Sound(inputs, opened, torch.stack(free.logits), torch.stack(guarded.logits))


@pytest.fixture
def victim(model: Model, sound: Sound) -> Model:
    """A model to break."""
    return copy.deepcopy(model)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and what has to be said about it.

    Attributes:
        message: that the error has to match.
        before: breaks the model before the guard is attached.
        after: breaks it once it is.
        guard: makes the guard to attach from the fitted one; by default its gate is opened.
        error: the error's class.
        ways: of calling the model in which it shows.
        tokens: how many steps have chosen a token when the fault strikes.
        inputs: to call the model with, made from sound ones.
    """

    message: str
    before: Spoil = lambda model, undo: None
    after: Spoil = lambda model, undo: None
    guard: Callable[[Guard], Guard] = lambda guard: guard.variant(gate=GATES["open"])
    error: type[BaseException] = SafeguardError
    ways: tuple[str, ...] = ("generate", "forward")
    tokens: int = 0
    inputs: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda inputs: inputs


def fails_closed(model: Model, guard: Guard, sound: Sound, fault: Fault, way: str) -> None:
    """Assert the four things that hold for every fault. `model` may be broken for good."""
    watch, output = Watch(), None
    state = hooks(model)
    with ExitStack() as undo:
        fault.before(model, undo)
        attachment = fault.guard(guard).attach(model)
        with pytest.raises(fault.error, match=fault.message), attachment:  # noqa: PT012
            fault.after(model, undo)
            inputs = fault.inputs(sound.inputs)
            if way == "forward":
                with torch.no_grad():
                    output = model(**inputs)
            else:
                output = model.generate(
                    **inputs,
                    max_new_tokens=3,
                    do_sample=False,
                    streamer=watch,
                    logits_processor=[watch],
                )
    assert output is None
    assert watch.steps == fault.tokens
    assert len(watch.streamed) == fault.tokens * len(sound.inputs["input_ids"])
    works(model, sound, state)


def works(model: Model, sound: Sound, state: dict[str, Any]) -> None:
    """Assert that `model` is unguarded, as it was in `state`, and can be guarded."""
    assert hooks(model) == state
    free = answer(model, sound.inputs, max_new_tokens=1)
    assert torch.equal(torch.stack(free.logits), sound.free)
    with sound.guard.attach(model):
        guarded = answer(model, sound.inputs, max_new_tokens=1)
    assert torch.equal(torch.stack(guarded.logits), sound.guarded)
    assert hooks(model) == state


# --- ways to break a model ---


def decoder(model: Model) -> nn.Module:
    module: nn.Module = model.model.language_model
    return module


def layer(index: int) -> Callable[[Model], nn.Module]:
    return lambda model: model.model.language_model.layers[index]


def tower(model: Model) -> nn.Module:
    module: nn.Module = model.model.vision_tower
    return module


def head(model: Model) -> nn.Module:
    module: nn.Module = model.lm_head
    return module


def itself(model: Model) -> nn.Module:
    return model


def hook(where: Callable[[Model], nn.Module], do: Callable[..., Any], **options: Any) -> Spoil:
    """`do` as a forward hook of other code."""
    return lambda model, undo: undo.callback(
        where(model).register_forward_hook(do, **options).remove
    )


def first(where: Callable[[Model], nn.Module], do: Callable[[Model], Any]) -> Spoil:
    """`do` with the model, before each pass through a module, if it is not being done already."""

    def spoil(model: Model, undo: ExitStack) -> None:
        busy = False

        def pre_hook(*_: Any) -> None:
            nonlocal busy
            if not busy:
                busy = True
                try:
                    do(model)
                finally:
                    busy = False

        undo.callback(where(model).register_forward_pre_hook(pre_hook).remove)

    return spoil


def at_call(number: int, where: Callable[[Model], nn.Module], do: Callable[..., Any]) -> Spoil:
    """`do` with a module's output, at its `number`-th call from now on."""

    def spoil(model: Model, undo: ExitStack) -> None:
        calls = 0

        def count(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            return do(output) if calls == number else None

        undo.callback(where(model).register_forward_hook(count).remove)

    return spoil


def throw(error: type[BaseException]) -> Callable[..., Any]:
    def thrown(*_: Any) -> None:
        raise error("thrown by other code")

    return thrown


def not_numbers(output: Tensor) -> Tensor:
    return torch.full_like(output, NAN)


def not_a_number_before_the_last(output: Tensor) -> Tensor:
    spoilt = output.clone()
    spoilt[:, -2] = NAN
    return spoilt


def bypass(model: Model, undo: ExitStack) -> None:
    """Layer 3 runs its `forward` directly: hooks do not fire."""
    broken = layer(3)(model)
    real = type(broken)
    broken.__class__ = type("Direct", (real,), {"__call__": real.forward})
    undo.callback(setattr, broken, "__class__", real)


def undone(model: Model, undo: ExitStack) -> None:
    """What layer 2 did is undone before layer 3 reads it."""
    kept: list[Tensor] = []
    undo.callback(
        layer(2)(model)
        .register_forward_pre_hook(lambda m, args: kept.append(args[0].clone()))
        .remove
    )
    undo.callback(
        layer(3)(model).register_forward_pre_hook(lambda m, args: (kept.pop(), *args[1:])).remove
    )


def tower_for_a_decoder(model: Model, undo: ExitStack) -> None:
    model.get_decoder = lambda *args, **kwargs: model.model.vision_tower  # type: ignore[method-assign]
    undo.callback(delattr, model, "get_decoder")


def layers_of_the_tower(model: Model, undo: ExitStack) -> None:
    """As many as the decoder has, but none of them acts on a text."""
    real = vars(Backbone)["of"]
    wrong = replace(Backbone.of(model), layers=tuple(model.model.vision_tower.encoder.layers))
    undo.callback(setattr, Backbone, "of", real)
    Backbone.of = classmethod(lambda cls, model: wrong)  # type: ignore[method-assign,assignment]


def swapped(name: str, make: Callable[[nn.Module], nn.Module]) -> Spoil:
    """Another module in the place of the one by that name, copied before hooks are on it."""

    def spoil(model: Model, undo: ExitStack) -> None:
        parent, _, child = name.rpartition(".")
        owner, real = model.get_submodule(parent), model.get_submodule(name)
        undo.callback(setattr, owner, child, real)
        setattr(owner, child, make(real))

    return spoil


def first_five(layers: nn.Module) -> nn.Module:
    assert isinstance(layers, nn.ModuleList)
    return layers[:5]


def fresh(module: nn.Module) -> nn.Module:
    """A copy that carries no hooks."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return twin


def training(where: Callable[[Model], nn.Module]) -> Spoil:
    def spoil(model: Model, undo: ExitStack) -> None:
        undo.callback(model.eval)
        where(model).train()

    return spoil


def cast(dtype: torch.dtype) -> Spoil:
    def spoil(model: Model, undo: ExitStack) -> None:
        for weight in model.parameters():
            undo.callback(setattr, weight, "data", weight.data)
        for module in model.modules():
            undo.callback(module._buffers.update, dict(module._buffers))
        model.to(dtype)

    return spoil


def moved(model: Model, undo: ExitStack) -> None:
    """To another device; the meta device is one that every machine has."""
    embeddings = model.get_input_embeddings()
    undo.callback(setattr, embeddings, "weight", embeddings.weight)
    embeddings.weight = nn.Parameter(embeddings.weight.to("meta"))


def clear(where: Callable[[Model], nn.Module], name: str) -> Spoil:
    return lambda model, undo: getattr(where(model), name).clear()


def steal(where: Callable[[Model], nn.Module], name: str) -> Callable[[Model], None]:
    return lambda model: getattr(where(model), name).clear()


def ignoring(do: Callable[[Model], Any]) -> Callable[[Model], None]:
    """`do`, by code that does not let an error through."""

    def ignored(model: Model) -> None:
        with suppress(SafeguardError):
            do(model)

    return ignored


def run_again(model: Model) -> None:
    model(input_ids=torch.tensor([[5, 6]]))


def generate_again(model: Model) -> None:
    model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=1)


# --- ways to break a guard ---


def directions(**changes: Callable[[Tensor], Tensor]) -> Callable[[Guard], Guard]:
    def change(guard: Guard) -> Guard:
        there = guard.policy.directions
        return guard.variant(
            directions=replace(there, **{n: f(getattr(there, n)) for n, f in changes.items()})
        )

    return change


def fingerprint(change: Callable[[Any], dict[str, Any]]) -> Callable[[Guard], Guard]:
    return lambda g: g.variant(fingerprint=replace(g.fingerprint, **change(g.fingerprint)))


def known_by_embeddings(change: Callable[[Tensor], Tensor]) -> Callable[[Guard], Guard]:
    """As a guard of format 3 knows its model, which is this one."""
    old = Guard.from_pretrained(Path(__file__).parent / "data" / "guard-format-3").fingerprint
    assert isinstance(old, EmbeddingSample)
    return lambda g: g.variant(fingerprint=EmbeddingSample(change(old.values)))


def drift(change: Callable[[Tensor], Tensor]) -> Callable[[Guard], Guard]:
    return lambda guard: guard.variant(drift=change(guard.policy.drift))


def criterion(kind: type[Criterion], **changes: Any) -> Callable[[Guard], Guard]:
    """With fields of one of the gate's criteria changed, unchecked."""

    def change(guard: Guard) -> Guard:
        return guard.variant(
            gate=tuple(
                each.model_copy(update=changes) if isinstance(each, kind) else each
                for each in guard.policy.gate
            )
        )

    return change


def variant(**changes: Any) -> Callable[[Guard], Guard]:
    return lambda guard: guard.variant(**changes)


def one(value: float) -> Callable[[Tensor], Tensor]:
    """With one value of layer 2 changed."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[2, ..., 0] = value
        return tensor

    return change


def to(target: Any) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(target)


opened, held, closed = (
    variant(gate=GATES["open"]),
    lambda guard: spanning(guard, Span.ANSWER, gate=GATES["open"]),
    lambda guard: with_thresholds(guard, CLOSED),
)
once = ("generate",)


# --- the faults ---

BEFORE_ATTACHING: dict[str, Fault] = {
    "a layer's hook does not fire": Fault("only .2. took part", before=bypass),
    "a layer's effect is undone": Fault(r"layers \[2\] of", before=undone),
    "a hook writes over the edit": Fault(
        "do not act", before=hook(layer(3), lambda m, args, out: torch.zeros_like(out))
    ),
    "a hook put first writes over the edit": Fault(
        "do not act",
        before=hook(layer(3), lambda m, args, out: torch.zeros_like(out), prepend=True),
    ),
    "get_decoder gives the vision tower": Fault(
        "gives a CLIPVisionModel", before=tower_for_a_decoder
    ),
    "the layers are those of the vision tower": Fault("took part", before=layers_of_the_tower),
    "the decoder has lost a layer": Fault(
        "6 decoder layers",
        before=swapped("model.language_model.layers", first_five),
    ),
    "the model is in training": Fault("training mode", before=training(itself)),
    "the layers put out no numbers": Fault(
        "do not act", before=hook(layer(1), lambda m, args, out: not_numbers(out))
    ),
    "a layer throws": Fault(
        "thrown", before=hook(layer(5), throw(InjectedError)), error=InjectedError
    ),
    "the head throws": Fault(
        "thrown", before=hook(head, throw(InjectedError)), error=InjectedError
    ),
}

OF_THE_GUARD: dict[str, Fault] = {
    **{
        f"{value} in the {name}": Fault(f"{name} holds values that are not finite", guard=change)
        for value in (NAN, INF)
        for name, change in {
            "directions": directions(vectors=one(value)),
            "drift": drift(one(value)),
            "harmful mean": directions(harmful_mean=one(value)),
            "harmless mean": directions(harmless_mean=one(value)),
        }.items()
    },
    **{
        f"{what} {name}": Fault(f"{name} is torch", guard=change)
        for what, kind in (
            ("float64", torch.float64),
            ("half", torch.float16),
            ("meta", torch.device("meta")),
        )
        for name, change in {
            "directions": directions(vectors=to(kind)),
            "drift": drift(to(kind)),
            "harmful mean": directions(harmful_mean=to(kind)),
            "harmless mean": directions(harmless_mean=to(kind)),
        }.items()
    },
    **{
        f"{kind.__name__}'s threshold is {value}": Fault(
            f"threshold {value}", guard=criterion(kind, threshold=value)
        )
        for kind in (TextScore, ImageScore)
        for value in (NAN, INF)
    },
    "NaN in directions that a random subspace replaces": Fault(
        "directions holds", guard=lambda g: directions(vectors=one(NAN))(g).variant(random_seed=1)
    ),
    "means that are the same": Fault(
        "not a number",
        guard=lambda g: directions(harmful_mean=lambda _: g.policy.directions.harmless_mean)(g),
    ),
    "vectors that are not orthonormal": Fault(
        "not orthonormal", guard=directions(vectors=lambda v: v * 1.01)
    ),
    "vectors of one layer": Fault("have shape", guard=directions(vectors=lambda v: v[0])),
    "a drift of other width": Fault("drift has shape", guard=drift(lambda d: d[:, :7])),
    "a strength that is no number": Fault(
        "not finite", guard=variant(edit=Refuse(NAN), gate=GATES["open"])
    ),
    "a strength without bounds": Fault(
        "not finite", guard=variant(edit=Project(INF), gate=GATES["open"])
    ),
    "a layer that is not there": Fault("Layers", guard=variant(layers=(2, 6))),
    "a negative layer": Fault("Layers", guard=variant(layers=(-1, 2))),
    "no layers": Fault("Layers", guard=variant(layers=())),
    "layers out of order": Fault("Layers", guard=variant(layers=(3, 2), gate=GATES["open"])),
    "a gate on a layer that is not there": Fault(
        "Layers", guard=criterion(TextScore, layers=(2, 9))
    ),
    "rank 0": Fault("rank is 0", guard=variant(rank=0)),
    "a rank that is not stored": Fault("rank is 9", guard=variant(rank=9)),
    "another model's embeddings (format 3)": Fault(
        "other weights", guard=known_by_embeddings(lambda values: -values)
    ),
    "embeddings that are no numbers (format 3)": Fault(
        "other weights", guard=known_by_embeddings(lambda values: values * NAN)
    ),
    "a fingerprint of weights that are no numbers": Fault(
        "other weights: .* more of",
        guard=fingerprint(
            lambda f: {"weights": {name: entries * NAN for name, entries in f.weights.items()}}
        ),
    ),
    "a fingerprint of states that are no numbers": Fault(
        "behaves otherwise.*scores", guard=fingerprint(lambda f: {"states": f.states * NAN})
    ),
    "a fingerprint of logits that are no numbers": Fault(
        "behaves otherwise.*logits", guard=fingerprint(lambda f: {"logits": f.logits * NAN})
    ),
    "another decoder": Fault(
        "whose decoder_path is vision",
        guard=lambda g: g.variant(
            provenance=g.provenance.model_copy(update={"decoder_path": "vision"})
        ),
    ),
}

AFTER_ATTACHING: dict[str, Fault] = {
    "a layer's hook does not fire": Fault("only .2. took part", after=bypass),
    "a layer is replaced": Fault(
        "were replaced after attaching", after=swapped("model.language_model.layers.3", fresh)
    ),
    "a layer is replaced, the gate closed": Fault(
        "were replaced after attaching",
        after=swapped("model.language_model.layers.5", fresh),
        guard=closed,
    ),
    "the decoder is replaced": Fault(
        "were replaced after attaching", after=swapped("model.language_model", fresh)
    ),
    "the decoder is replaced, the gate closed": Fault(
        "were replaced after attaching",
        after=swapped("model.language_model", fresh),
        guard=closed,
    ),
    "the head is replaced by a copy": Fault(
        "Parts of the model were replaced", after=swapped("lm_head", fresh)
    ),
    "the embeddings are replaced by copies": Fault(
        "Parts of model.language_model were replaced",
        after=swapped("model.language_model.embed_tokens", fresh),
    ),
    "the vision tower is replaced by a copy": Fault(
        "Parts of model were replaced", after=swapped("model.vision_tower", copy.deepcopy)
    ),
    "the decoder loses a layer": Fault(
        "were replaced after attaching",
        after=swapped("model.language_model.layers", first_five),
    ),
    "training mode": Fault("training mode", after=training(itself)),
    "training mode of the decoder": Fault("training mode", after=training(decoder)),
    "the model is cast": Fault("moved or cast", after=cast(torch.bfloat16)),
    "the model is moved": Fault("moved or cast", after=moved),
    "the model's pre-hook is removed": Fault(
        "removed by other code", after=clear(itself, "_forward_pre_hooks"), ways=once
    ),
    "the model's pre-hook is removed, then forward": Fault(
        "ran outside", after=clear(itself, "_forward_pre_hooks"), ways=("forward",)
    ),
    "the model's post-hook is removed": Fault(
        "removed by other code", after=clear(itself, "_forward_hooks")
    ),
    "the decoder's pre-hook is removed": Fault(
        "removed by other code", after=clear(decoder, "_forward_pre_hooks")
    ),
    "a layer's hooks are removed in the pass": Fault(
        "removed", after=first(layer(2), steal(layer(3), "_forward_hooks"))
    ),
    "a layer's hooks are removed in the pass, no text-only pass": Fault(
        "removed",
        after=first(layer(2), steal(layer(3), "_forward_hooks")),
        guard=variant(gate=GATES["open"], edit=Project()),
    ),
    "the model's pre-hook is removed in the pass": Fault(
        "ran outside", after=first(head, steal(itself, "_forward_pre_hooks")), ways=once, tokens=1
    ),
    "the model's post-hook is removed in the pass": Fault(
        "already running", after=first(head, steal(itself, "_forward_hooks")), ways=once, tokens=1
    ),
    "the vision tower's features are no numbers": Fault(
        "not finite",
        inputs=lambda i: i | {"pixel_values": torch.full_like(i["pixel_values"], NAN)},
    ),
    "the vision tower's features are no numbers, calibrated gate": Fault(
        "not a number",
        guard=lambda g: g,
        inputs=lambda i: i | {"pixel_values": torch.full_like(i["pixel_values"], NAN)},
    ),
    "a mask of other length": Fault(
        "attention_mask", inputs=lambda i: i | {"attention_mask": i["attention_mask"][:, 1:]}
    ),
    "a mask for one row": Fault(
        "attention_mask", inputs=lambda i: i | {"attention_mask": i["attention_mask"][:1]}
    ),
    "a mask of four dimensions": Fault(
        "attention_mask",
        inputs=lambda i: i | {"attention_mask": i["attention_mask"][:, None, None]},
    ),
    "a mask of nothing": Fault(
        "no text to judge",
        inputs=lambda i: i | {"attention_mask": torch.zeros_like(i["attention_mask"])},
    ),
    "nothing but an image": Fault(
        "no text to judge",
        inputs=lambda i: {
            "input_ids": torch.full((2, 4), 4),
            "attention_mask": torch.ones(2, 4).long(),
            "pixel_values": i["pixel_values"],
        },
    ),
    **{
        f"{name} {kind} {place}": Fault(
            "already running|ran outside|took part|cannot be told apart",
            after=first(where, how(again)),
            # what is refused before the pass of `generate` begins does that pass no harm
            ways=("forward",)
            if how is ignoring and (again is generate_again or where is tower)
            else ("generate", "forward"),
        )
        for name, again in (("generate", generate_again), ("forward", run_again))
        for kind, how in (("again in", lambda do: do), ("again, its error ignored, in", ignoring))
        for place, where in (
            ("the vision tower", tower),
            ("layer 0", layer(0)),
            ("layer 5", layer(5)),
            ("the head", head),
        )
    },
}

THROWN: dict[str, Fault] = {
    f"{error.__name__} in {place}, {name} pass": Fault(
        "thrown by other code",
        after=at_call(number, where, throw(error)),
        error=error,
        tokens=int(number == DECODE),
        ways=once if number == DECODE else ("generate", "forward"),
    )
    for name, number in (("text-only", TEXT), ("multimodal", IMAGE), ("decoding", DECODE))
    for place, where in (
        ("layer 0", layer(0)),
        ("layer 2", layer(2)),
        ("layer 3", layer(3)),
        ("layer 5", layer(5)),
        ("the decoder", decoder),
    )
    for error in (InjectedError, KeyboardInterrupt)
    if error is InjectedError or place == "layer 3"
} | {
    f"{place}": Fault(
        "thrown by other code", after=at_call(1, where, throw(InjectedError)), error=InjectedError
    )
    for place, where in (("the vision tower", tower), ("the head", head))
}

NOT_NUMBERS: dict[str, Fault] = {
    f"{name} pass at layer {index}, {kind}": Fault(
        "not finite|not a number",
        after=at_call(number, layer(index), not_numbers),
        guard=held if number == DECODE else change,
        tokens=int(number == DECODE),
        ways=once if number == DECODE else ("generate", "forward"),
    )
    for name, number, indices in (
        ("text-only", TEXT, (0, 2, 3)),
        ("multimodal", IMAGE, (0, 2)),
        ("decoding", DECODE, (0, 2)),
    )
    for index in indices
    for kind, change in {
        "open": opened,
        "calibrated": lambda guard: guard,
        "paper": variant(gate=GATES["paper"], edit=Restore()),
    }.items()
    if number == TEXT or kind == "open" or (number == IMAGE and index == 0 and kind == "calibrated")
} | {
    f"text-only pass at layer {index}, one token of the request": Fault(
        "not finite", after=at_call(TEXT, layer(index), not_a_number_before_the_last), guard=opened
    )
    for index in (2, 3)
}

FAULTS = {
    f"{when}: {name}": fault
    for when, faults in {
        "before": BEFORE_ATTACHING,
        "guard": OF_THE_GUARD,
        "after": AFTER_ATTACHING,
        "thrown": THROWN,
        "NaN": NOT_NUMBERS,
    }.items()
    for name, fault in faults.items()
}


def faults_and_ways() -> Iterator[Any]:
    """`make test` takes each fault in one of its ways, in turns; `make test-thorough` the other."""
    for number, (name, fault) in enumerate(FAULTS.items()):
        struck_at_once = not name.startswith(("after", "thrown", "NaN"))
        ways = [way for way in fault.ways if way == "generate" or not struck_at_once]
        for place, way in enumerate(ways):
            marks = () if number % len(ways) == place else pytest.mark.thorough
            yield pytest.param(name, way, id=f"{name}, {way}", marks=marks)


@pytest.mark.parametrize(("name", "way"), faults_and_ways())
def test_nothing_comes_of_a_fault(
    victim: Model, guard: Guard, sound: Sound, name: str, way: str
) -> None:
    fails_closed(victim, guard, sound, FAULTS[name], way)


# --- what is changed, and still guarded ---


def seal(model: Model, undo: ExitStack) -> None:
    """`generate` as the class has it, which does not know the guard."""
    model.generate = type(model).generate.__get__(model)  # type: ignore[method-assign]
    undo.callback(lambda: vars(model).pop("generate", None))


HARMLESS: dict[str, Spoil] = {
    "generate is overwritten": seal,
    "a hook looks at a layer": hook(layer(2), lambda m, args, out: None),
    "a hook put first looks at a layer": hook(layer(2), lambda m, args, out: None, prepend=True),
    "generate is called again and its error ignored": first(tower, ignoring(generate_again)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_the_guard_still_acts_where(victim: Model, sound: Sound, name: str) -> None:
    state = hooks(victim)
    with ExitStack() as undo:
        with sound.guard.attach(victim):
            HARMLESS[name](victim, undo)
            out = answer(victim, sound.inputs, max_new_tokens=1)
            assert [receipt.guarded for receipt in sound.guard.receipts] == [True, True]
        assert torch.equal(torch.stack(out.logits), sound.guarded)
    works(victim, sound, state)


def test_a_hook_that_prepends_changes_what_is_edited_not_the_edit(
    victim: Model, sound: Sound
) -> None:
    """Other code's change comes first, the edit last: the coordinates are the guard's."""
    guard = sound.guard.variant(edit=Project(), layers=(2,))
    basis = guard.policy.basis()[2, : guard.policy.rank]
    seen: list[Tensor] = []
    with guard.attach(victim), ExitStack() as undo, torch.no_grad():
        hook(layer(2), lambda m, args, out: out + 1, prepend=True)(victim, undo)
        undo.callback(
            layer(3)(victim).register_forward_pre_hook(lambda m, a: seen.append(a[0])).remove
        )
        victim(**sound.inputs)
    # the prepended hook of a pass is the guard's, which runs first; then this one's change
    moved_by = basis.sum(-1)
    torch.testing.assert_close(
        seen[-1][:, -1] @ basis.mT, moved_by.expand(2, -1), rtol=1e-4, atol=1e-4
    )


# --- compiled graphs ---


def compiled_decoder(model: Model) -> None:
    decoder(model).compile(backend="eager")


def compiled_layer(model: Model) -> None:
    layer(1)(model).compile(backend="eager")


def wrapped_layer(model: Model) -> None:
    model.model.language_model.layers[1] = torch.compile(layer(1)(model), backend="eager")


@pytest.mark.parametrize(
    ("spoil", "ran_before"),
    [
        # its graph was traced without hooks
        pytest.param(compiled_decoder, True, marks=pytest.mark.thorough),
        (compiled_layer, True),
        pytest.param(wrapped_layer, False, marks=pytest.mark.thorough),
    ],
)
def test_a_graph_compiled_before_attaching_is_guarded_or_refused(
    processor: LlavaProcessor, spoil: Callable[[Model], None], ran_before: bool
) -> None:
    """A graph may hold no hooks: either the guard acts in it, or the canary finds it out.

    On two layers, as every layer is traced anew in every pass of another kind.
    """
    model = make_model(processor, layers=2)
    inputs = ask(processor, QUESTIONS[:1])
    opened = small_guard(model, processor).variant(layers=(0, 1), gate=GATES["open"])

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**inputs, use_cache=False).logits[:, -1]
        return found

    free = logits()
    with opened.attach(model):
        guarded = logits()
    spoil(model)
    try:
        if ran_before:
            torch.testing.assert_close(logits(), free)
        try:
            with opened.attach(model):
                torch.testing.assert_close(logits(), guarded)
                assert opened.receipts[0].guarded
        except SafeguardError as error:
            assert "took part" in str(error) or "do not act" in str(error)  # noqa: PT017
        torch.testing.assert_close(logits(), free)
    finally:
        torch.compiler.reset()


# --- more than one guard ---


@pytest.mark.parametrize("other", [False, True], ids=["same", "other"])
def test_a_second_guard_is_refused_and_the_first_goes_on(
    victim: Model, sound: Sound, other: bool
) -> None:
    state = hooks(victim)
    with sound.guard.attach(victim):
        inside = hooks(victim)
        second = sound.guard.variant(edit=Project()) if other else sound.guard
        with pytest.raises(SafeguardError, match="already attached"):
            second.attach(victim).__enter__()
        assert hooks(victim) == inside
        out = answer(victim, sound.inputs, max_new_tokens=1)
        assert torch.equal(torch.stack(out.logits), sound.guarded)
    works(victim, sound, state)


def test_guards_of_two_models_may_be_left_in_either_order(model: Model, sound: Sound) -> None:
    twins = copy.deepcopy(model), copy.deepcopy(model)
    states = [hooks(twin) for twin in twins]
    attached = [sound.guard.attach(twin) for twin in twins]
    for one_of in attached:
        one_of.__enter__()
    for one_of in attached:  # the first first
        one_of.__exit__(None, None, None)
    for twin, state in zip(twins, states, strict=True):
        works(twin, sound, state)


def test_a_model_that_shares_its_decoder_with_a_guarded_one_is_refused(
    victim: Model, sound: Sound
) -> None:
    other = copy.copy(victim)
    other._modules, other._forward_hooks = dict(victim._modules), type(victim._forward_hooks)()
    other._forward_pre_hooks = type(victim._forward_pre_hooks)()
    state = hooks(victim)
    with sound.guard.attach(victim):
        with pytest.raises(SafeguardError, match="outside the guarded model"):
            sound.guard.attach(other).__enter__()
        with pytest.raises(SafeguardError, match="outside the guarded model"):
            other.generate(**sound.inputs, max_new_tokens=1)
    works(victim, sound, state)


def test_generate_kept_from_inside_the_block_generates_nothing_after_it(
    victim: Model, sound: Sound
) -> None:
    state, watch = hooks(victim), Watch()
    with sound.guard.attach(victim):
        kept = victim.generate
    with pytest.raises(SafeguardError, match="block was left"):
        kept(**sound.inputs, max_new_tokens=2, streamer=watch, logits_processor=[watch])
    assert watch.steps == 0
    works(victim, sound, state)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SafeguardError])
def test_leaving_by_an_exception_restores_the_model(
    victim: Model, sound: Sound, error: type[BaseException]
) -> None:
    state = hooks(victim)

    def work() -> None:
        with sound.guard.attach(victim):
            victim.generate(**sound.inputs, max_new_tokens=1)
            raise error

    with pytest.raises(error):
        work()
    works(victim, sound, state)


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"layers": 5}, {"width": 64}], ids=["weights", "layers", "width"]
)
def test_another_model_is_refused(
    processor: LlavaProcessor, guard: Guard, options: dict[str, int]
) -> None:
    other = make_model(processor, **options)
    before = hooks(other)
    message = {"seed": "other weights", "layers": "num_layers", "width": "hidden_size"}
    with pytest.raises(SafeguardError, match=message[next(iter(options))]):
        guard.attach(other).__enter__()
    assert hooks(other) == before


# --- caches ---


def test_output_of_a_pass_that_was_not_checked_is_withheld(victim: Model, sound: Sound) -> None:
    """One token only, so that no later pass would find out that the post-hook is gone."""
    state = hooks(victim)
    with ExitStack() as undo, sound.guard.attach(victim):
        first(head, steal(itself, "_forward_hooks"))(victim, undo)
        with pytest.raises(SafeguardError, match="withheld"):
            victim.generate(**sound.inputs, max_new_tokens=1)
    works(victim, sound, state)


def test_a_hook_lost_while_decoding_is_an_error(
    victim: Model, processor: LlavaProcessor, sound: Sound
) -> None:
    inputs = ask(processor, QUESTIONS[:1])
    state = hooks(victim)
    guard = spanning(sound.guard, Span.ANSWER)
    with guard.attach(victim), torch.no_grad(), ExitStack() as undo:
        out = victim(**inputs, use_cache=True)
        first(layer(2), steal(layer(2), "_forward_hooks"))(victim, undo)
        with pytest.raises(SafeguardError, match="removed"):
            step(victim, out, inputs["attention_mask"])
    works(victim, sound, state)


def test_nothing_goes_on_from_a_cache_that_an_error_left_half_filled(
    victim: Model, sound: Sound
) -> None:
    state = hooks(victim)
    mask = torch.cat([sound.inputs["attention_mask"], torch.ones(2, 1).long()], dim=1)
    with sound.guard.attach(victim), torch.no_grad():
        cache = DynamicCache(config=victim.config.get_text_config())
        with ExitStack() as undo:
            at_call(IMAGE, layer(5), throw(InjectedError))(victim, undo)
            with pytest.raises(InjectedError):
                victim(**sound.inputs, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() > 0
        with pytest.raises((SafeguardError, IndexError)):
            victim(input_ids=torch.full((2, 1), 9), attention_mask=mask, past_key_values=cache)
    works(victim, sound, state)


def test_caches_that_cannot_be_guarded_are_refused(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS[:2])
    mask = inputs["attention_mask"]
    with torch.no_grad():
        foreign = model(**inputs, use_cache=True)
        attachment = open_guard.attach(model)
        with attachment:
            with pytest.raises(SafeguardError, match="not filled under this guard"):
                step(model, foreign, mask)
            longer = torch.cat([mask, torch.ones(2, 1).long()], dim=1)
            with pytest.raises(SafeguardError, match="not filled under"):  # by position
                model(torch.full((2, 1), 9), None, longer, None, foreign.past_key_values)
            own = model(**inputs, use_cache=True)
            with pytest.raises(SafeguardError, match="2 new tokens"):
                step(model, own, mask, tokens=2)
            with pytest.raises(SafeguardError, match="not filled under this guard"):
                step(model, own, mask, past_key_values=copy.deepcopy(own.past_key_values))
            step(model, own, mask)
        with attachment, pytest.raises(SafeguardError, match="not filled under"):
            step(model, own, mask)  # the requests are forgotten when the block is left


def test_generate_refuses_a_cache_that_holds_the_whole_prompt(victim: Model, sound: Sound) -> None:
    state, watch = hooks(victim), Watch()
    with torch.no_grad():
        cache = victim(**sound.inputs, use_cache=True).past_key_values
    prompt = {name: sound.inputs[name] for name in ("input_ids", "attention_mask")}
    with (
        sound.guard.attach(victim),
        pytest.raises((SafeguardError, IndexError, RuntimeError, ValueError)),
    ):
        victim.generate(**prompt, past_key_values=cache, max_new_tokens=2, logits_processor=[watch])
    assert watch.steps == 0
    works(victim, sound, state)


def test_a_batch_that_changes_is_refused(
    model: Model, processor: LlavaProcessor, open_guard: Guard
) -> None:
    inputs = ask(processor, QUESTIONS[:2])
    with open_guard.attach(model), torch.no_grad():
        out = model(**inputs, use_cache=True)
        out.past_key_values.batch_select_indices(torch.tensor([0]))
        out.logits = out.logits[:1]
        with pytest.raises(SafeguardError, match="batch changed from 2 to 1"):
            step(model, out, inputs["attention_mask"][:1])
