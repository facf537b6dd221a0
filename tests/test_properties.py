"""The contracts on random batches: what holds for the examples has to hold for all requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaProcessor

from support.observe import Model, answer
from support.reference import (
    counterparts,
    edit_by_hand,
    followed,
    run_row,
    same_receipt,
    with_thresholds,
)
from tiny.pocket import IMAGE_SIDE, LAYERS, PATCH, make_processor
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.generation_prompt import learn_generation_prompt
from vlm_safeguard.policy.edits import Add, Drift, Edit, Project, Reference, Refuse, Restore
from vlm_safeguard.policy.gate import GATES, AnyCriterion, ImageScore, TextScore
from vlm_safeguard.policy.media import Media
from vlm_safeguard.policy.own_refusal import OwnRefusal
from vlm_safeguard.policy.span import Span
from vlm_safeguard.policy.text_view import TextView
from vlm_safeguard.policy.threshold import threshold_for

IMAGE = [4] * (IMAGE_SIDE // PATCH) ** 2  # "<image>" as the processor expands it
PAD = 1
ENDS = list(learn_generation_prompt(make_processor()).direct)
CLOSED = 1e9  # a threshold that no score passes


def examples(count: int) -> Callable[[Any], Any]:
    """The same examples in every run, however slow the machine; none is shrunk, for minutes."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def counts(few: int, many: int) -> pytest.MarkDecorator:
    """How many examples `make test` takes, and `make test-thorough`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.thorough)])


# --- random requests ---

words = st.lists(st.integers(5, 400), min_size=1, max_size=6)
strength = st.floats(-1.5, 1.5).map(lambda value: round(value, 3))
spans = st.sampled_from(list(Span))
edits = st.one_of(
    st.builds(Restore, strength, spans, st.booleans()),
    *(st.builds(edit, strength, spans) for edit in (Refuse, Project, Drift, Add)),
)


@st.composite
def rows(draw: st.DrawFn, image: bool | None = None) -> list[int]:
    """One prompt: text, and an image or two in it or none, as drawn if not given."""
    row = draw(words)
    shown = draw(st.booleans()) if image is None else image
    for _ in range(draw(st.integers(1, 2)) if shown else 0):
        row += [*IMAGE, *draw(words)]
    return [*row, *([] if shown else draw(words)), *ENDS]


batches = st.lists(rows(), min_size=1, max_size=5)
shown_batches = st.lists(rows(True), min_size=1, max_size=5)


def padded(prompts: list[list[int]], extra: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Model inputs, padded on the left; a row's image is noise that follows from its tokens."""
    width = max(map(len, prompts)) + extra
    inputs = {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
        ),
    }
    shown = torch.cat([pictures(row) for row in prompts]).to(dtype)
    return inputs | ({"pixel_values": shown} if len(shown) else {})


def pictures(row: list[int]) -> Tensor:
    seed = torch.Generator().manual_seed(sum(i * token for i, token in enumerate(row, 1)))
    count = row.count(4) // len(IMAGE)
    return torch.randn(count, 3, IMAGE_SIDE, IMAGE_SIDE, generator=seed)


# --- (a) closed gate, identical output ---


def run(model: Model, inputs: dict[str, Tensor], tokens: int) -> list[Tensor]:
    """The answer's tokens and every step's logits; for no tokens, all of the prompt's logits."""
    if tokens == 0:
        with torch.no_grad():
            return [model(**inputs).logits]
    out = answer(model, inputs, max_new_tokens=tokens)
    return [out.sequences, *out.logits]


@counts(50, 150)
def test_closed_rows_are_bit_identical_in_any_batch(model: Model, guard: Guard, count: int) -> None:
    """In `generate`, and for no tokens in a plain `forward`; at whatever thresholds."""
    seen = {True: 0, False: 0}  # rows whose gate was open, and closed

    @examples(count)
    @given(
        prompts=batches,
        edit=edits,
        tokens=st.sampled_from([0, 0, 0, 1, 2, 3]),
        extra=st.integers(0, 2),
        data=st.data(),
    )
    def check(
        prompts: list[list[int]], edit: Edit, tokens: int, extra: int, data: st.DataObject
    ) -> None:
        inputs = padded(prompts, extra)
        free = run(model, inputs, tokens)
        threshold = data.draw(st.sampled_from([-2.0, -0.5, 0.0, 0.5, CLOSED]))
        looks = data.draw(st.sampled_from([-1.0, 0.0, CLOSED]))
        placed = with_thresholds(guard, threshold, image=looks).variant(edit=edit)
        with placed.attach(model):
            guarded = run(model, inputs, tokens)
        assert len(placed.receipts) == len(prompts)
        for row, (prompt, receipt) in enumerate(zip(prompts, placed.receipts, strict=True)):
            assert receipt.images == prompt.count(4) // len(IMAGE)
            assert receipt.guarded <= (4 in prompt or edit.edits_text)
            seen[receipt.guarded] += 1
            if not receipt.guarded:
                for left, right in zip(free, guarded, strict=True):
                    assert torch.equal(left[row], right[row])

    check()
    assert min(seen.values()) > count / 2


# --- (b) an open row is edited as by hand, whoever its neighbours are ---


@counts(35, 100)
def test_an_edit_of_a_row_is_that_by_hand_in_any_batch(
    exact_model: Model, guard: Guard, count: int
) -> None:
    """Float64 to 1e-10, of one image or two; the row is anywhere in the batch.

    Its answer, of which the prompt may hold the beginning, follows the opening of a refusal for
    `agree` tokens, and the others' do, too.
    """

    @examples(count)
    @given(
        prompts=shown_batches,
        extra=st.integers(0, 3),
        data=st.data(),
        edit=st.one_of(
            st.builds(Restore, st.just(1.0), spans, st.booleans()),
            st.builds(Refuse, st.just(1.0), spans),
        ),
        opening=st.lists(st.integers(5, 59), max_size=3).map(tuple),
        agree=st.integers(0, 3),
        begun=st.integers(0, 2),
        follows=st.booleans(),
    )
    def check(
        prompts: list[list[int]],
        extra: int,
        edit: Edit,
        opening: tuple[int, ...],
        agree: int,
        begun: int,
        follows: bool,
        data: st.DataObject,
    ) -> None:
        opened = guard.variant(gate=GATES["open"], edit=edit, refusal_prefix=opening)
        written = [*(opening[:begun] if follows else [61] * begun)]
        said = [*opening[len(written) : agree], 60]
        row = data.draw(st.integers(0, len(prompts) - 1))
        asked = len(prompts[row])
        prompts = [[*each, *written] for each in prompts]
        prompt = prompts[row]
        inputs = padded(prompts, extra, torch.float64)
        start = inputs["input_ids"].shape[1]
        with opened.attach(exact_model):
            out = answer(
                exact_model,
                inputs,
                max_new_tokens=len(said) + 1,
                prefix_allowed_tokens_fn=lambda _, ids: [(*said, 60)[len(ids) - start]],
            )
        words = [token for token in prompt[:asked] if token != 4]
        text, _ = run_row(exact_model, [*words, *opening])
        edited = followed(opened, [*written, *said])
        spanned = counterparts(opened, prompt[:asked], words)
        spanned |= {asked + i: len(words) - 1 for i in range(len(written))}
        spanned |= {asked + i: len(words) + i for i in range(edited)}
        change = edit_by_hand(opened, dict(enumerate(text)), spanned, asked - 1)
        _, logits = run_row(
            exact_model,
            [*prompt, *said],
            pictures(prompt).double(),
            change=change,
            stop=None if edit.span is Span.ANSWER else asked + max(edited, len(written)),
        )
        for mine, theirs in zip(out.logits, logits[len(prompt) - 1 :], strict=True):
            torch.testing.assert_close(mine[row], theirs, rtol=1e-10, atol=1e-10)

    check()


# --- (c) order ---


@examples(30)
@given(prompts=st.lists(rows(), min_size=2, max_size=5), edit=edits, data=st.data())
def test_permuted_rows_have_permuted_results_and_receipts(
    exact_model: Model, guard: Guard, prompts: list[list[int]], edit: Edit, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(prompts))))
    placed = with_thresholds(guard, 0.0, image=100.0).variant(edit=edit)
    found = []
    with placed.attach(exact_model):
        for batch in (prompts, [prompts[row] for row in order]):
            out = answer(exact_model, padded(batch, dtype=torch.float64), max_new_tokens=2)
            found.append((out, placed.receipts))
    (plain, receipts), (turned, turned_receipts) = found
    for place, row in enumerate(order):
        same_receipt(turned_receipts[place], receipts[row])
        assert torch.equal(turned.sequences[place], plain.sequences[row])
        for left, right in zip(turned.logits, plain.logits, strict=True):
            torch.testing.assert_close(left[place], right[row], rtol=1e-10, atol=1e-10)


# --- (d) the text-only view ---

VIEW = TextView(
    frozenset({4}),
    frame_ids=frozenset({401, 402}),
    glue_ids=frozenset({403}),
    glue_length=1,
    before=(404,),
    after=(405,),
)
framed = st.builds(
    lambda parts: [401, *(token for part in parts for token in part), 402],
    st.lists(
        st.builds(
            lambda count, glued: [4] * count + [403] * glued + [4], st.integers(1, 4), st.booleans()
        ),
        min_size=1,
        max_size=3,
    ),
)


@examples(200)
@given(st.lists(st.tuples(words, framed, st.booleans()), max_size=4), words)
def test_the_view_is_the_row_without_its_images(
    parts: list[tuple[list[int], list[int], bool]], end: list[int]
) -> None:
    """Whether or not the template's wrapper stands around an image."""
    row: list[int] = []
    without: list[int] = []
    places: list[int] = []
    for text, image, wrapped in parts:
        places += range(len(row), len(row) + len(text))
        row += [*text, *([404] if wrapped else []), *image, *([405] if wrapped else [])]
        without += text
    places += range(len(row), len(row) + len(end))
    row, without = row + end, without + end
    assert VIEW(row) == without
    assert VIEW.aligned(row) == (without, places)
    assert VIEW.first_medium(row) == (row.index(401) if parts else len(row))
    assert VIEW(VIEW(row)) == VIEW(row)
    assert VIEW.media(row) == Media(images=len(parts), tokens=row.count(4))
    assert VIEW.media(without) == Media()


@examples(200)
@given(st.lists(st.sampled_from([4, 401, 402, 403, 404, 405, 5, 6, 7]), max_size=30))
def test_no_placeholder_stays_however_tokens_are_mixed(row: list[int]) -> None:
    """Typed placeholders, too, and nothing is added or put in another order."""
    seen = VIEW(row)
    assert 4 not in seen
    rest = iter(row)
    assert all(token in rest for token in seen)
    assert VIEW.media(seen) == Media()
    assert [token for token in seen if token in (5, 6, 7)] == [
        token for token in row if token in (5, 6, 7)
    ]


@examples(100)
@given(text=st.text(alphabet="ab <>image|/\n", max_size=30), copies=st.integers(0, 3))
def test_typed_placeholder_text_cannot_remain(
    processor: LlavaProcessor, guard: Guard, text: str, copies: int
) -> None:
    row = processor.tokenizer(text + "<image>" * copies + text)["input_ids"]
    assert not guard.policy.text_view.placeholder_ids & set(guard.policy.text_view(row))


# --- (e) the edits ---


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Tensor, Tensor, Reference]:
    """States, orthonormal rows, and what to aim at; float64, any shape."""
    count, hidden = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    m = draw(st.integers(1, hidden))
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    V = torch.linalg.qr(noise(hidden, m)).Q.T.contiguous()
    return noise(count, hidden), V, Reference(noise(count, m), noise(m), noise(m))


def near(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@examples(150)
@given(spaces(), st.sampled_from([Restore(), Restore(one_sided=False), Refuse(), Project()]))
def test_editing_twice_is_editing_once(space: tuple[Tensor, Tensor, Reference], edit: Edit) -> None:
    h, V, at = space
    once = edit(h, V, at)
    near(edit(once, V, at), once)


@examples(150)
@given(spaces(), edits)
def test_nothing_moves_at_strength_0_nor_ever_outside_the_subspace(
    space: tuple[Tensor, Tensor, Reference], edit: Edit
) -> None:
    h, V, at = space
    near(replace(edit, strength=0.0)(h, V, at), h)
    moved = edit(h, V, at) - h
    near(moved, moved @ V.T @ V)


@examples(150)
@given(spaces(), st.sampled_from([Restore, Refuse]), st.floats(0, 1))
def test_one_sided_edits_never_lower_the_harm_coordinate(
    space: tuple[Tensor, Tensor, Reference], edit: type[Edit], strength: float
) -> None:
    h, V, at = space
    assert (edit(strength)(h, V, at) @ V[0] >= h @ V[0] - 1e-10).all()


# --- (f) thresholds, and keeping ---


@examples(200)
@given(
    st.lists(st.floats(-5, 5, width=32) | st.just(-float("inf")), min_size=1, max_size=300),
    st.floats(0.001, 0.999),
)
def test_no_more_calibration_scores_pass_than_the_budget_allows(
    scores: list[float], budget: float
) -> None:
    harmless = torch.tensor(scores)
    if int(budget * (len(scores) + 1)) < 1:
        with pytest.raises(ValueError, match="needs at least"):
            threshold_for(harmless, budget)
        return
    threshold = threshold_for(harmless, budget)
    assert (harmless > threshold).float().mean() <= budget
    assert threshold in scores


ids = st.integers(0, 100_000)
tokens = st.lists(ids, max_size=4).map(tuple)
finite = st.floats(allow_nan=False, allow_infinity=False)
views = st.builds(
    TextView,
    st.frozensets(ids, min_size=1, max_size=3),
    st.frozensets(ids, max_size=3),
    st.frozensets(ids, max_size=3),
    st.integers(0, 9),
    tokens,
    st.frozensets(ids, max_size=3),
    tokens,
    tokens,
    st.booleans(),
)
layer_lists = st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted).map(tuple)


@st.composite
def gates(draw: st.DrawFn, first_layer: int) -> tuple[AnyCriterion, ...]:
    """Any subset of the criteria, in any order."""
    made: dict[str, Any] = {"budget": draw(st.floats(0.001, 0.999)), "calibrated_on": draw(ids)}
    every = [
        *GATES["open"],
        *GATES["paper"],
        OwnRefusal(
            tokens=(draw(ids), *draw(tokens)),
            slack=draw(finite),
            layers=draw(layer_lists),
            score_above=draw(finite),
        ),
        TextScore(layers=draw(layer_lists), threshold=draw(finite), **made),
        ImageScore(layer=draw(st.integers(0, first_layer)), threshold=draw(finite), **made),
    ]
    order = draw(st.permutations(every))
    return tuple(order[: draw(st.integers(1, len(order)))])


@examples(100)
@given(
    layers=layer_lists,
    rank=st.integers(1, 8),
    opening=tokens,
    seed=st.none() | st.integers(0, 2**31),
    edit=edits,
    view=views,
    name=st.text(max_size=20),
    scores=st.lists(finite, max_size=5),
    noise=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_guard_that_is_saved_and_loaded_is_the_same(
    guard: Guard,
    layers: tuple[int, ...],
    rank: int,
    opening: tuple[int, ...],
    seed: int | None,
    edit: Edit,
    view: TextView,
    name: str,
    scores: list[float],
    noise: int,
    data: st.DataObject,
) -> None:
    drift = torch.randn(guard.policy.drift.shape, generator=torch.Generator().manual_seed(noise))
    saved = guard.variant(
        layers=layers,
        rank=rank,
        refusal_prefix=opening,
        other_prefixes=(opening, opening[::-1]) if opening else (),
        random_seed=seed,
        edit=edit,
        text_view=view,
        gate=data.draw(gates(layers[0])),
        drift=drift,
        scores={"calibration": torch.tensor(scores, dtype=torch.float64)},
        provenance=guard.provenance.model_copy(update={"model_name": name}),
    )
    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        loaded = Guard.from_pretrained(folder)
    for field in (
        "layers",
        "rank",
        "refusal_prefix",
        "other_prefixes",
        "random_seed",
        "edit",
        "gate",
        "text_view",
    ):
        assert getattr(loaded.policy, field) == getattr(saved.policy, field)
    assert loaded.provenance == saved.provenance
    assert loaded.policy.sha256() == saved.policy.sha256()
    assert torch.equal(loaded.policy.drift, saved.policy.drift)
    assert torch.equal(loaded.scores["calibration"], saved.scores["calibration"])
    assert torch.equal(loaded.policy.basis(), saved.policy.basis())
