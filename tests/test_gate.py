"""The gate's criteria against plain loops; the threshold against leave-one-out counting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from vlm_safeguard.policy.criterion import Criterion
from vlm_safeguard.policy.decision import decide
from vlm_safeguard.policy.directions import fit_directions
from vlm_safeguard.policy.discriminant import fit_discriminant
from vlm_safeguard.policy.gate import (
    GATES,
    AnyCriterion,
    Gate,
    ImageScore,
    PaperSign,
    TextDiscriminant,
    TextScore,
)
from vlm_safeguard.policy.own_refusal import (
    OwnRefusal,
    RefusalDiscriminant,
    RefusalWords,
)
from vlm_safeguard.policy.reading import Reading
from vlm_safeguard.policy.threshold import threshold_for

LAYERS, HIDDEN, ROWS = 5, 8, 6
WINDOW = (2, 3, 4)


@pytest.fixture
def reading() -> Reading:
    """Of six requests, three of which the model would decline."""
    torch.manual_seed(0)
    harmful, harmless = torch.randn(2, 10, LAYERS, HIDDEN)
    directions = fit_directions(harmful + 1, harmless, 2)
    states = {layer: torch.randn(ROWS, HIDDEN) + 0.5 for layer in range(LAYERS)}
    margin = torch.tensor([-2.0, -0.1, 0.0, 0.5, 2.0, 3.0])
    prefix = torch.tensor([-2.0, -0.1, 0.0, -0.5, -4.0, 1.0])
    return Reading(states, directions, WINDOW, margin, prefix)


def harm(reading: Reading, row: int, layers: tuple[int, ...]) -> float:
    """The centred score, one layer at a time."""
    total, made = 0.0, reading.directions
    for layer in layers:
        v = made.vectors[layer, 0]
        high, low = (float(x[layer] @ v) for x in (made.harmful_mean, made.harmless_mean))
        total += 2 * (float(reading.states[layer][row] @ v) - low) / (high - low) - 1
    return total / len(layers)


def test_the_texts_score_opens_above_its_threshold(reading: Reading) -> None:
    criterion = TextScore(layers=(1, 3), threshold=0, budget=0.1, calibrated_on=9)
    scores = criterion.score(reading)
    assert scores[:, 0].tolist() == pytest.approx(
        [harm(reading, row, (1, 3)) for row in range(ROWS)], abs=1e-4
    )
    for row in range(ROWS):  # a threshold at each row's own score: above it only is open
        placed = criterion.model_copy(update={"threshold": float(scores[row])})
        is_open = placed.opens(placed.score(reading), 3)
        assert is_open.tolist() == [[bool(x > scores[row])] * 3 for x in scores]


def test_the_images_score_is_of_one_layer_of_the_multimodal_pass(reading: Reading) -> None:
    criterion = ImageScore(layer=1, threshold=0.1, budget=0.1, calibrated_on=9)
    assert (criterion.reads, criterion.watched) == ("image", (1,))
    scores = criterion.score(reading)
    expected = [harm(reading, row, (1,)) for row in range(ROWS)]
    assert scores[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert criterion.opens(scores, 2).tolist() == [[x > 0.1] * 2 for x in expected]


def told(reading: Reading, row: int, layers: tuple[int, ...]) -> float:
    """The score under the discriminant, one layer at a time."""
    made = reading.discriminant
    assert made is not None
    each = [float(reading.states[n][row] @ made.weights[n] - made.offset[n]) for n in layers]
    return sum(each) / len(layers)


@pytest.mark.parametrize(("kind", "scored"), [(OwnRefusal, harm), (RefusalDiscriminant, told)])
@pytest.mark.parametrize("slack", [0.0, 1.0])
@pytest.mark.parametrize("above", [-9.0, 0.0, 9.0])
@pytest.mark.parametrize("floor", [None, -9.0, 0.2])
def test_a_refusal_counts_in_about_its_usual_words_or_where_the_text_scores_harmful(
    reading: Reading,
    kind: type[OwnRefusal | RefusalDiscriminant],
    scored: Callable[[Reading, int, tuple[int, ...]], float],
    slack: float,
    above: float,
    floor: float | None,
) -> None:
    """But in its usual words not where the text scores as low as the floor; only in between do the
    words decide, and are read.
    """
    harmful, harmless = torch.randn(2, 20, LAYERS, HIDDEN)
    reading = replace(reading, discriminant=fit_discriminant(harmful + 1, harmless, 0.5))
    criterion = kind(tokens=(7,), slack=slack, layers=(1, 3), score_above=above, score_floor=floor)
    scores = criterion.score(reading)
    assert reading.margin is not None
    assert reading.prefix_margin is not None
    for row in range(ROWS):
        margin, words = float(reading.margin[row]), float(reading.prefix_margin[row])
        score = scored(reading, row, (1, 3))
        assert float(scores[row, 2]) == pytest.approx(score, abs=1e-4)
        asked = margin > 0 and (floor is None or score > floor) and score <= above
        assert bool(criterion.awaits_words(reading, [False] * ROWS)[row]) == asked
        expected = margin > 0 and (score > above or (asked and words > -slack))
        assert criterion.opens(scores, 3)[row].tolist() == [expected] * 3
        sentence = criterion.says(scores[row].tolist(), expected)
        assert (sentence is None) == (margin <= 0)
        assert ("itself refuse" in (sentence or "")) == expected
        assert ("own_opening" in criterion.shown(scores[row].tolist())) == asked


@pytest.mark.parametrize("place", [None, 0, 1, 3])
def test_the_refusal_of_a_sentence_alone_counts_above_a_score_of_its_own(
    reading: Reading, place: int | None
) -> None:
    """In whatever words, which are not read; that of a text counts as if it had no sentences."""
    assert reading.margin is not None
    margins = reading.margin.tolist()
    scores = [harm(reading, row, (1, 3)) for row in range(ROWS)]
    declined = [row for row in range(ROWS) if margins[row] > 0]
    answered = next(row for row in range(ROWS) if margins[row] <= 0)
    bounds = [-9.0, *sorted(scores[row] + 1e-4 for row in declined)]
    above = None if place is None else bounds[place]
    bare = OwnRefusal(tokens=(7,), slack=1.0, layers=(1, 3), score_above=9.0)
    gate = (bare.model_copy(update={"alone_above": above}),)
    whole = decide((bare,), "text", [(row,) for row in range(ROWS)], reading, 2)
    decision = decide(gate, "text", [(answered, row) for row in range(ROWS)], reading, 2)
    for row in range(ROWS):
        counts = margins[row] > 0 and above is not None and scores[row] > above
        assert decision.is_open[row].tolist() == [counts] * 2
        told = decision.findings[row][0]
        shown = row if counts else answered
        assert told.measures == {"own_refusal": pytest.approx(margins[shown])}
        assert (told.sentence or "").startswith("of one of its sentences alone") == counts
    same = decide(gate, "text", [(row, answered) for row in range(ROWS)], reading, 2)
    assert same.is_open.tolist() == whole.is_open.tolist()
    assert same.findings == whole.findings


def test_the_papers_gate_is_a_sign_a_layer(reading: Reading) -> None:
    criterion = PaperSign()
    scores = criterion.score(reading)
    is_open = criterion.opens(scores, len(WINDOW))
    for row in range(ROWS):
        expected = [
            sum(
                float(a * b)
                for a, b in zip(
                    reading.states[n][row], reading.directions.vectors[n, 0], strict=True
                )
            )
            > 0
            for n in WINDOW
        ]
        assert is_open[row].tolist() == expected
        assert criterion.shown(scores[row].tolist()) == {
            "open_layers": pytest.approx(sum(expected) / 3)
        }
        assert f"{sum(expected)} of 3" in criterion.says(scores[row].tolist(), any(expected))
    assert is_open.any()
    assert not is_open.all()


# --- decisions ---


def test_any_criterion_opens_and_each_says_its_own(reading: Reading) -> None:
    scores = [harm(reading, row, (1, 3)) for row in range(ROWS)]
    ranked = sorted(scores)
    threshold = (ranked[2] + ranked[3]) / 2
    gate: tuple[Criterion, ...] = (
        OwnRefusal(tokens=(7,), slack=0.0, layers=(1, 3), score_above=99),
        TextScore(layers=(1, 3), threshold=threshold, budget=0.1, calibrated_on=9),
        ImageScore(layer=1, threshold=0.0, budget=0.1, calibrated_on=9),
    )
    asked = [(5,), (0,), (), (4,), (3,)]  # requests 0, 1, 3 and 4; the third is left alone
    decision = decide(gate, "text", asked, reading, 3)
    assert decision.awaits_image
    for rows, is_open, findings in zip(
        asked, decision.is_open.tolist(), decision.findings, strict=True
    ):
        if not rows:
            assert (is_open, findings) == ([False] * 3, ())
            continue
        (row,) = rows
        own, text = row == 5, scores[row] > threshold
        assert [f.criterion for f in findings] == ["own_refusal", "text_score"]
        assert [f.opened for f in findings] == [own, text]
        assert is_open == [own or text] * 3
    more = decide(gate, "image", asked, reading, 3)
    both = decision.merged(more)
    assert not both.awaits_image
    assert torch.equal(both.is_open, decision.is_open | more.is_open)
    assert [len(f) for f in both.findings] == [3, 3, 0, 3, 3]


def test_a_request_is_open_by_its_text_or_by_a_sentence_of_it(reading: Reading) -> None:
    """And what is said is what was measured of that: of the text, if it opens by that."""
    scores = [harm(reading, row, (1, 3)) for row in range(ROWS)]
    order = sorted(range(ROWS), key=lambda row: scores[row])
    low, lower, high, higher = order[1], order[0], order[-2], order[-1]
    threshold = (scores[order[-3]] + scores[high]) / 2
    gate = (TextScore(layers=(1, 3), threshold=threshold, budget=0.1, calibrated_on=9),)
    asked = [(low, lower), (low, high, higher), (high, low, higher)]
    decision = decide(gate, "text", asked, reading, 2)
    assert decision.is_open.tolist() == [[False, False], [True, True], [True, True]]
    told = [finding for (finding,) in decision.findings]
    assert [f.opened for f in told] == [False, True, True]
    for finding, row in zip(told, (low, high, high), strict=True):
        assert finding.measures["text_score"] == pytest.approx(scores[row])
    alone = [(f.sentence or "").startswith("of one of its sentences alone") for f in told]
    assert alone == [False, True, False]


def test_a_gate_that_is_always_open_reads_no_pass() -> None:
    decision = decide(GATES["open"], "nothing", [(0,), ()], None, 2)
    assert decision.is_open.tolist() == [[True, True], [False, False]]
    assert not decision.awaits_image
    with pytest.raises(AssertionError):
        GATES["open"][0].score(None)  # type: ignore[arg-type]


def test_a_score_that_is_no_number_is_an_error(reading: Reading) -> None:
    broken = replace(reading, states={n: x * math.nan for n, x in reading.states.items()})
    gate = (TextScore(layers=(1,), threshold=0, budget=0.1, calibrated_on=9),)
    with pytest.raises(Exception, match=r"text-only pass .* not a number \(text_score\)"):
        decide(gate, "text", [(0,)], broken, 1)


# --- thresholds ---


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.1, 0.29, 0.5])
def test_threshold_keeps_the_budget_and_no_more(budget: float) -> None:
    """Leave one out of n + 1 exchangeable requests: the share that opens is the guarantee."""
    count = 120
    pool = torch.randn(count, generator=torch.Generator().manual_seed(0))
    opened = tighter = 0
    for i in range(count):
        rest = torch.cat([pool[:i], pool[i + 1 :]])
        threshold = threshold_for(rest, budget)
        assert threshold in rest.tolist()
        opened += int(float(pool[i]) > threshold)
        below = [value for value in rest.tolist() if value < threshold]
        tighter += int(float(pool[i]) > max(below, default=-math.inf))
    assert opened / count <= budget
    assert tighter / count > budget  # the next lower threshold would break it


def test_threshold_of_ties_and_small_samples() -> None:
    assert threshold_for(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.4) == 3.0
    assert threshold_for(torch.arange(199.0), 0.005) == 198.0
    with pytest.raises(ValueError, match=r"needs at least 199 .*there are 198"):
        threshold_for(torch.arange(198.0), 0.005)


# --- keeping ---

KEPT: list[Criterion] = [
    *GATES["open"],
    RefusalWords(tokens=(3, 4), slack=0.5),
    *GATES["paper"],
    OwnRefusal(tokens=(3, 4), slack=0.5, layers=(1, 2), score_above=0.25),
    TextScore(layers=(1, 2), threshold=0.25, budget=0.01, calibrated_on=200),
    RefusalDiscriminant(tokens=(3,), slack=0.5, layers=(1,), score_floor=-0.5),
    TextDiscriminant(layers=(1, 2), threshold=0.25, budget=0.01, calibrated_on=200),
    ImageScore(layer=1, threshold=0.75, budget=0.01, calibrated_on=200),
]


@pytest.mark.parametrize("criterion", KEPT, ids=lambda criterion: criterion.name)
def test_criteria_come_back_from_json(criterion: Criterion) -> None:
    adapter: TypeAdapter[tuple[AnyCriterion, ...]] = TypeAdapter(Gate)
    text = f"[{criterion.model_dump_json()}]"
    assert adapter.validate_json(text) == (criterion,)


def test_criteria_are_strict() -> None:
    adapter: TypeAdapter[tuple[AnyCriterion, ...]] = TypeAdapter(Gate)
    for bad in ({"name": "ajar"}, {}, {"name": "open", "width": 3}, {"name": "text_score"}):
        with pytest.raises(ValidationError):
            adapter.validate_python((bad,))
    with pytest.raises(ValidationError):
        adapter.validate_python(())
    with pytest.raises(ValidationError):
        GATES["open"][0].name = "paper"
    for budget in (0.0, 1.0, -0.1):
        with pytest.raises(ValidationError):
            TextScore(layers=(1,), threshold=0, budget=budget, calibrated_on=1)
    for layers in ((), ("a",)):
        with pytest.raises(ValidationError):
            TextScore(layers=layers, threshold=0, budget=0.1, calibrated_on=1)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        OwnRefusal(tokens=(), slack=1, layers=(1,))
    for kind, fields in ((TextScore, {"layers": (1,)}), (ImageScore, {"layer": 1})):
        with pytest.raises(ValidationError):
            kind(threshold=math.nan, budget=0.1, calibrated_on=1, **fields)
