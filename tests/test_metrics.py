"""Metrics against enumeration and closed forms; rows and `results.json`."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_safeguard.evaluation.judges.agreement import Agreement, agreements
from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import SHARES, Row
from vlm_safeguard.evaluation.statistics import (
    Estimate,
    bootstrap,
    cohens_kappa,
    confusion,
    mcnemar,
    mean,
    ratio,
)

ROOT = Path(__file__).parents[1]
NAMES = {"defence": "none", "condition": "text", "prompts": "harmful"}


@pytest.mark.parametrize(("only_a", "only_b"), [*product(range(6), range(6)), (1, 9)])
def test_mcnemar_by_trying_every_way_the_differences_could_fall(only_a: int, only_b: int) -> None:
    a = [True] * only_a + [False] * only_b + [True, False, False]
    b = [False] * only_a + [True] * only_b + [True, False, False]
    differ = only_a + only_b
    off = abs(only_a - only_b)
    ways = list(product((1, -1), repeat=differ))
    p = sum(abs(sum(way)) >= off for way in ways) / len(ways)
    found = mcnemar(a, b)
    assert (found.n, found.only_a, found.only_b) == (differ + 3, only_a, only_b)
    assert found.p == pytest.approx(p, abs=1e-15)
    assert mcnemar(b, a).p == found.p


def test_mcnemar_with_many_differences_and_with_unequal_lists() -> None:
    assert mcnemar([True] * 900, [False] * 900).p == 2.0**-899
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


LABELS = st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("xyz")), min_size=1, max_size=9)


@settings(deadline=None, derandomize=True, database=None)
@given(LABELS)
def test_kappa_by_going_through_every_pair_of_answers(pairs: list[tuple[str, str]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    table = confusion(a, b, "xyz")
    for (i, row), (j, column) in product(enumerate("xyz"), enumerate("xyz")):
        assert table[i][j] == sum(pair == (row, column) for pair in pairs)
    agreed = sum(x == y for x, y in pairs) / len(pairs)
    chance = sum(x == y for x, y in product(a, b)) / len(pairs) ** 2
    found = cohens_kappa(table)
    if chance == 1:
        assert found is None
    else:
        assert found == pytest.approx((agreed - chance) / (1 - chance))


def test_kappa_of_a_textbook_table_and_of_nothing() -> None:
    assert cohens_kappa([[20, 5], [10, 15]]) == pytest.approx(0.4)
    assert cohens_kappa([[0, 0], [0, 0]]) is None
    with pytest.raises(ValueError, match="not among"):
        confusion(["x"], ["?"], "xyz")


def test_judges_agree_on_what_both_can_read() -> None:
    verdicts = {
        "phrases": [Verdict(True, None), Verdict(False, None), Verdict(False, None)] * 2,
        "guard": [Verdict(None, False), Verdict(None, True), Verdict(None, False)] * 2,
        "grader": [Verdict(True, False, 0.0), Verdict(None, None, note="unreadable")] * 3,
    }
    first, second, third, fourth = agreements(verdicts)
    assert first == Agreement(
        "succeeded",
        "phrases",
        "guard",
        6,
        0,
        pytest.approx(0.4),  # type: ignore[arg-type]
        [[2, 0], [2, 2]],
    )
    assert (second.question, second.judge_a, second.judge_b) == ("succeeded", "phrases", "grader")
    assert (second.n, second.left_out, second.table) == (3, 3, [[1, 0], [2, 0]])
    assert (third.question, third.judge_b) == ("refused", "grader")
    assert (third.n, third.left_out, third.table) == (3, 3, [[0, 2], [0, 1]])
    assert (fourth.judge_a, fourth.judge_b, fourth.kappa) == ("guard", "grader", 0.0)
    with pytest.raises(ValueError, match="zip"):
        agreements({"one": verdicts["guard"], "two": verdicts["guard"][:-1]})


def share_below(values: list[float], at: float) -> tuple[float, float]:
    """Shares of all resamples' means that are < `at` and ≤ `at`, every resample tried."""
    means = [sum(rows) / len(rows) for rows in product(values, repeat=len(values))]
    slack = 1e-12
    return (
        sum(m < at - slack for m in means) / len(means),
        sum(m <= at + slack for m in means) / len(means),
    )


def test_bootstrap_interval_of_a_mean_by_trying_every_resample() -> None:
    values = [0.3, 1.1, 2.9, 4.2, 9.7]
    found = mean(values)
    assert found.n == 5
    assert found.value == pytest.approx(sum(values) / 5)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        below, up_to = share_below(values, end)
        assert below - 0.006 < share < up_to + 0.006


def test_bootstrap_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)).exp().tolist()
    centre = sum(values) / 500
    error = math.sqrt(sum((x - centre) ** 2 for x in values)) / 500
    found = mean(values)
    assert found.low == pytest.approx(centre - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(centre + 1.96 * error, abs=0.15 * error)


def test_a_ratio_is_of_means_and_of_pairs() -> None:
    below = torch.rand(60, generator=torch.Generator().manual_seed(2)).add(0.1).tolist()
    exact = ratio([2 * x for x in below], below)
    assert (exact.value, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio([1.0, 9.0], [1.0, 3.0]).value == 2.5  # not the mean of 1 and 3
    # the delta method's standard error of a ratio of means
    noisy = [2 * x + 0.3 * math.sin(7 * i) for i, x in enumerate(below)]
    found = ratio(noisy, below)
    residuals = [x - found.value * y for x, y in zip(noisy, below, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals)) / sum(below)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)


def test_bootstrap_repeats_and_says_what_it_cannot_do() -> None:
    values = [1.0, 2.0, 5.0]
    assert mean(values) == mean(values)
    assert mean([3.0]) == Estimate(1, 3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="columns of"):
        mean([])
    with pytest.raises(ValueError, match="columns of"):
        ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        mean([1.0, math.nan])
    with pytest.raises(ValueError, match="not finite"):
        ratio([1.0, 1.0], [1.0, 0.0])  # some resample is all of the second


def test_a_bootstrap_too_large_to_hold_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 7) for i in range(50)]
    whole = mean(values)
    monkeypatch.setattr("vlm_safeguard.evaluation.statistics._ENTRIES", 1000)
    parts = bootstrap([values], lambda means: means[:, 0])
    assert parts.value == whole.value
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.1)


def test_rows_hold_what_the_suite_measures() -> None:
    row = Row.of(mean([1.0, 4.0]), **NAMES, metric="seconds", benchmark="xstest")
    assert (row.n, row.value, row.benchmark, row.judge) == (2, 2.5, "xstest", None)
    judged = Row.count([True, False], **NAMES, metric="attack_success", judge="llama-guard")
    assert judged.judge == "llama-guard"
    assert judged.metric in SHARES
    assert row.metric not in SHARES
    with pytest.raises(ValueError, match="metric"):
        Row.count([True], **NAMES, metric="goodness")


def test_the_published_results_still_read() -> None:
    results = Results.model_validate_json((ROOT / "docs" / "results.json").read_text("utf-8"))
    assert len(results.rows) > 40
    assert {row.benchmark for row in results.rows} == {"harmful", "harmless", "scenes"}
    assert {row.judge for row in results.rows if row.metric == "refusal"} == {"refusal"}
    assert all(row.low <= row.value <= row.high for row in results.rows)
    assert Results.model_validate_json(results.model_dump_json()) == results


@pytest.mark.parametrize("name", ["results/pocket", "results/coder"])
def test_format_1_is_read_whole(name: str) -> None:
    path = ROOT / name / "results.json"
    old = json.loads(path.read_text("utf-8")) | {"format": 1}
    if "details" not in old:
        pytest.skip("kept in the current format")
    details = old["details"]
    results = Results.model_validate(old)
    assert len(results.rows) == len(old["rows"])
    closed = results.closed_gates
    assert closed.answers == details["closed_gate_rows"]
    assert closed.identical == details["closed_gate_rows_identical"]
    new = results.model_dump(mode="json")
    assert new["comparisons"] == details.get("mcnemar", [])
    for same in ("agreement", "frontier", "unreadable", "provenance", "time_ratio_range"):
        if same in details:
            assert new[same] == details[same]
    known = {"agreement", "frontier", "unreadable", "provenance", "time_ratio_range", "mcnemar"}
    known |= {"closed_gate_rows", "closed_gate_rows_identical"}
    assert set(results.other) == set(details) - known
