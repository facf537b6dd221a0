"""Random cases: a guard, a batch of prompts in some shape, options, and who calls when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fuzzing.options import option_sets, rarely, some
from tiny.pocket import IMAGE_SIDE, PATCH, make_processor
from vlm_safeguard.policy.edits import Add, Drift, Edit, Project, Refuse, Restore
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.span import Span

IMAGE = [4] * (IMAGE_SIDE // PATCH) ** 2  # "<image>" as the processor expands it
PAD = 1
_tokenizer = make_processor().tokenizer
USER = _tokenizer("<|im_start|>user\n")["input_ids"]
END = _tokenizer("<|im_end|>\n")["input_ids"]
ANSWER = _tokenizer("<|im_start|>assistant\n")["input_ids"]
SYSTEM = _tokenizer("<|im_start|>system\n")["input_ids"]
MARKS = [token for mark in ".!?" for token in _tokenizer(mark)["input_ids"]]


class Refuses(NamedTuple):
    """When the model's own refusal opens the gate; see `OwnRefusal`."""

    tokens: tuple[int, ...]
    slack: float
    score_above: float
    score_floor: float | None
    alone_above: float | None


class Guarding(NamedTuple):
    """What a case's guard is: the fitted one with these.

    Attributes:
        gate: a named one, the fitted one, or thresholds of the text's score and the image's.
        has_words: whether words of refusals are known.
        parts: whether each sentence is judged by itself, too.
        refuses: the model's own refusal beside the thresholds, if that is asked, too.
    """

    layers: tuple[int, ...]
    edit: Edit
    gate: str | tuple[float, float | None]
    has_words: bool
    response: Response = Response.EDIT
    parts: bool = False
    refuses: Refuses | None = None


class Next(NamedTuple):
    """A turn that follows an answer: what is asked, and whether the cache is gone on with."""

    prompts: list[list[int]]
    cached: bool


@dataclass(frozen=True)
class Case:
    """One thing that a user may do.

    Attributes:
        prompts: token ids of each row.
        pads: more of them on the left than the longest row needs.
        ids, mask, pixels: in which form they are given.
        seed: of what is sampled.
        in_config: the options that are given in a `GenerationConfig`.
        streamed: whether a streamer looks on.
        way: `model.generate` or the attachment's.
        following: a second turn.
    """

    guarding: Guarding
    prompts: list[list[int]]
    pads: int
    ids: str
    mask: str
    pixels: str
    options: dict[str, Any]
    in_config: frozenset[str]
    seed: int
    streamed: bool
    way: str
    following: Next | None


def mostly(usual: str, *others: str, share: int = 12) -> st.SearchStrategy[str]:
    return rarely(share).flatmap(lambda odd: some(*others) if odd else st.just(usual))


words = st.lists(st.integers(5, 400) | some(*MARKS), min_size=1, max_size=6)
strength = st.floats(-1.5, 1.5).map(lambda value: round(value, 3))
spans = some(*Span)
edits = st.one_of(
    st.builds(Restore, strength, spans, st.booleans()),
    *(st.builds(edit, strength, spans) for edit in (Refuse, Refuse, Project, Drift, Add)),
)
guardings = st.builds(
    Guarding,
    layers=some((2, 3), (1, 2, 3, 4), (0,), (5,), (1, 4)),
    edit=edits,
    gate=some("open", "open", "paper", "fitted")
    | st.tuples(some(-1e6, -5.0, 0.0, 20.0, 1e9), some(None, None, -1.0, 0.0, 1e9)),
    has_words=rarely(4),
    response=some(Response.EDIT, Response.EDIT, Response.TEXT, Response.REFUSAL),
    parts=st.booleans(),
    refuses=st.none()
    | st.builds(
        Refuses,
        tokens=some(tuple(range(5, 200)), tuple(range(5, 450))),
        slack=some(0.0, 1.0, 10.0),
        score_above=some(-1e9, 0.0, 1e9),
        score_floor=some(None, 0.0),
        alone_above=some(None, -1e9, 0.0),
    ),
)


@st.composite
def contents(draw: st.DrawFn) -> list[int]:
    """What a user says: text, and up to three images in it, adjacent ones too."""
    row = draw(words)
    for _ in range(draw(some(0, 1, 1, 2, 3))):
        row += [*IMAGE, *draw(words | st.just([]))]
    return row


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """A conversation, or the beginning of its answer; seldom something else."""
    row: list[int] = []
    if draw(rarely(3)):
        row += [*SYSTEM, *draw(words), *END]
    for _ in range(draw(some(0, 0, 0, 1))):
        row += [*USER, *draw(contents()), *END, *ANSWER, *draw(words), *END]
    row += [*USER, *draw(contents()), *END]
    ends = draw(mostly("prompt", "nothing", "turn", "image", share=40))
    if ends != "nothing":
        row += ANSWER
    if draw(rarely(6)):
        row += draw(words)
    if ends == "turn":
        row += [*END, *USER, *draw(contents())]
    if ends == "image":
        row += IMAGE
    return row


batches = st.lists(prompts(), min_size=1, max_size=4)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    given = draw(batches)
    options = draw(option_sets())
    following = None
    if draw(rarely(4)):
        more = [draw(contents()) for _ in given]
        turns = [[*END, *USER, *each, *END, *ANSWER] for each in more]
        following = Next(turns, draw(st.booleans()))
    configured = draw(st.sets(some(*options))) if draw(rarely(4)) else set()
    return Case(
        guarding=draw(guardings),
        prompts=given,
        pads=draw(some(0, 0, 0, 1, 5)),
        ids=draw(mostly("keyword", "inputs", "positional", *SHAPES, share=10)),
        mask=draw(mostly("left", *MASKS, share=10)),
        pixels=draw(mostly("right", "none", "one more", "flat", share=20)),
        options=options,
        in_config=frozenset(configured),
        seed=draw(st.integers(0, 999)),
        streamed=draw(some(True, False, False)),
        way=draw(some("model", "model", "attachment")),
        following=following,
    )


# --- in the form that they are given ---

SHAPES = ("list", "one row", "no row", "no token", "floats", "out of range", "none", "int32")
MASKS = ("none", "right", "bools", "floats", "holes", "narrow", "one row", "four", "empty row")


def padded(rows: list[list[int]], pads: int) -> tuple[Tensor, Tensor]:
    """(rows, tokens) ids and mask, padded on the left."""
    width = max(map(len, rows)) + pads
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pixels_of(rows: list[list[int]]) -> Tensor | None:
    """(images, 3, side, side): noise that follows from each row's tokens."""
    shown = []
    for row in rows:
        seed = torch.Generator().manual_seed(sum(i * token for i, token in enumerate(row, 1)))
        shape = (row.count(4) // len(IMAGE), 3, IMAGE_SIDE, IMAGE_SIDE)
        shown.append(torch.randn(*shape, generator=seed, dtype=torch.float64))
    together = torch.cat(shown)
    return together if len(together) else None


def shaped(ids: Tensor, shape: str) -> Any:
    return {
        "list": ids.tolist(),
        "one row": ids[0],
        "no row": ids[:0],
        "no token": ids[:, :0],
        "floats": ids.float(),
        "out of range": ids + 10_000,
        "none": None,
        "int32": ids.int(),
    }.get(shape, ids)


def masked(mask: Tensor, form: str) -> Tensor | None:
    holes = mask.clone()
    holes[:, mask.shape[1] // 2] = 0
    empty = mask.clone()
    empty[-1] = 0
    return {
        "none": None,
        "right": mask.flip(1),
        "bools": mask.bool(),
        "floats": mask.double(),
        "holes": holes,
        "narrow": mask[:, 1:],
        "one row": mask[:1],
        "four": mask[:, None, None],
        "empty row": empty,
    }.get(form, mask)


def looked_at(pixels: Tensor | None, form: str) -> Tensor | None:
    if form == "none" or pixels is None:
        return None
    return {"one more": torch.cat([pixels, pixels[:1]]), "flat": pixels.flatten(1)}.get(
        form, pixels
    )
