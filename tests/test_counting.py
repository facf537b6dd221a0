"""What is counted of an evaluation's lines, against counts by hand; and the files they lie in."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.judges.measure import stored_record
from vlm_safeguard.evaluation.judges.verdict import Verdict
from vlm_safeguard.evaluation.results.comparisons import comparisons
from vlm_safeguard.evaluation.results.counting import (
    agreement,
    closed_gates,
    refusal_judge,
    rows,
    unreadable,
)
from vlm_safeguard.evaluation.results.folder import read_evaluation, write_results, write_samples
from vlm_safeguard.evaluation.results.frontier import Sweep, frontier
from vlm_safeguard.evaluation.results.lines import Line, read_lines, write_lines
from vlm_safeguard.evaluation.results.ratios import cost_ratios
from vlm_safeguard.evaluation.results.results import Results
from vlm_safeguard.evaluation.results.rows import Row
from vlm_safeguard.evaluation.statistics import wilson

REFUSED, ANSWERED = Verdict(True, None), Verdict(False, None)
SAFE, UNSAFE, UNREADABLE = Verdict(None, False), Verdict(None, True), Verdict(None, None, note="?")


def line(defence: str, number: int, **values: Any) -> Line:
    given: dict[str, Any] = {
        "benchmark": "evil",
        "sample": str(number),
        "kind": "harmless",
        "condition": "blank",
        "request": "?",
        "answer": "same",
    }
    return Line.model_validate(given | {"defence": defence} | values)


def receipt(guarded: bool) -> dict[str, Any]:
    return {"guarded": guarded, "reason": "so", "text_score": 0.25}


def judged(defence: str, verdicts: list[dict[str, Verdict]], kind: str = "harmful") -> list[Line]:
    return [line(defence, number, kind=kind, verdicts=each) for number, each in enumerate(verdicts)]


def test_results_name_the_refusal_judge_that_judged_all_of_their_lines() -> None:
    def answered(answer: str, verdict: Verdict) -> Line:
        return line("none", 0, answer=answer, verdicts={"refusal": verdict})

    lines = [answered("I can't help with that.", REFUSED), answered("Mix the flour.", ANSWERED)]
    assert refusal_judge(lines) == stored_record()
    earlier = answered("I can't wait to show you!", REFUSED)
    assert refusal_judge([*lines, earlier]) is None
    assert refusal_judge([line("none", 0, verdicts={"guard": SAFE})]) is None


def test_rows_by_hand() -> None:
    lines = judged(
        "none",
        [
            {"refusal": REFUSED, "guard": SAFE},
            {"refusal": ANSWERED, "guard": UNSAFE},
            {"refusal": ANSWERED, "guard": UNREADABLE},
        ],
    )
    counted = {(row.metric, row.judge): row for row in rows(lines)}
    assert {key: (row.n, row.value) for key, row in counted.items()} == {
        ("refusal", "refusal"): (3, 1 / 3),
        ("attack_success", "refusal"): (3, 2 / 3),
        ("attack_success", "guard"): (2, 1 / 2),
        ("unreadable", "guard"): (3, 1 / 3),
    }
    row = counted["attack_success", "guard"]
    assert (row.low, row.high) == wilson(1, 2)
    assert (row.benchmark, row.prompts, row.condition, row.defence) == (
        "evil",
        "harmful",
        "blank",
        "none",
    )
    assert unreadable(lines) == {"refusal": 0, "guard": 1}


def test_means_and_perplexity_of_what_was_measured() -> None:
    lines = [
        line("none", 0, tokens=10, seconds=1.0, nll=4.0, nll_tokens=2),
        line("none", 1, tokens=20, nll=1.0, nll_tokens=8),
        line("none", 2, kind="harmless", nll=0.0, nll_tokens=0),
    ]
    counted = {row.metric: row for row in rows(lines)}
    assert (counted["tokens"].n, counted["tokens"].value) == (2, 15)
    assert (counted["seconds"].n, counted["seconds"].value) == (1, 1.0)
    assert counted["perplexity"].value == pytest.approx(math.exp(5 / 10))
    assert lines[0].perplexity == pytest.approx(math.exp(2))
    assert lines[2].perplexity is None


def test_defences_are_compared_on_the_same_prompts() -> None:
    lines = judged("default", [{"j": SAFE}, {"j": SAFE}, {"j": UNSAFE}, {"j": UNREADABLE}])
    lines += judged("none", [{"j": UNSAFE}, {"j": UNSAFE}, {"j": UNSAFE}, {"j": UNSAFE}, {}])
    (test,) = comparisons(lines, "default")
    assert (test.a, test.b, test.metric, test.judge) == ("default", "none", "attack_success", "j")
    assert (test.n, test.only_a, test.only_b) == (3, 0, 2)
    assert test.p == 0.5  # 2 · (1/2)²
    asked = [line(d, n, kind="utility", correct=n > 0) for d in ("default", "none") for n in (0, 1)]
    (utility,) = comparisons(asked, "default")
    assert (utility.metric, utility.judge, utility.n) == ("accuracy", None, 2)
    assert comparisons(lines, "ecso") == []


def test_judges_agree_on_harmful_requests_alone() -> None:
    lines = judged("none", [{"a": UNSAFE, "b": UNSAFE}, {"a": SAFE, "b": UNSAFE}, {"a": SAFE}])
    lines += judged("none", [{"a": SAFE, "b": SAFE}] * 5, kind="harmless")
    (pair,) = agreement(lines)
    assert (pair.judge_a, pair.judge_b, pair.n, pair.left_out) == ("a", "b", 2, 1)
    assert pair.table == [[0, 1], [0, 1]]
    assert lines[1].disputed
    assert not lines[0].disputed


def test_a_closed_gate_that_changed_an_answer_is_counted() -> None:
    lines = [line("none", number) for number in range(3)]
    lines += [line("default", number, receipt=receipt(False)) for number in range(2)]
    lines += [line("default", 2, receipt=receipt(True), answer="other")]
    lines += [
        line("default", 9, receipt=receipt(False)),
        line("restore", 0, receipt=receipt(False)),
    ]
    counted = closed_gates(lines)
    assert (counted.answers, counted.identical) == (2, 2)
    lines[3] = lines[3].model_copy(update={"answer": "other"})
    counted = closed_gates(lines)
    assert (counted.answers, counted.identical) == (2, 1)


def test_the_frontier_is_judged_by_one_judge_all_along() -> None:
    harmless = judged("default", [{"refusal": REFUSED}, {"refusal": ANSWERED}], kind="harmless")
    first = judged("default", [{"refusal": REFUSED, "guard": UNSAFE}]) + harmless
    second = judged("default", [{"refusal": ANSWERED, "guard": SAFE}]) + harmless
    points = [Sweep("strength", 0.5, "blank", first), Sweep("strength", 1.0, "blank", second)]
    settings = frontier(points, ["refusal", "guard"])
    assert [point.attack_success.value for point in settings] == [1.0, 0.0]  # by the judge of harm
    assert [point.over_refusal.value for point in settings] == [0.5, 0.5]
    share = settings[0].over_refusal
    assert (share.n, (share.low, share.high)) == (2, wilson(1, 2))
    points[1] = Sweep("strength", 1.0, "blank", judged("default", [{"guard": UNREADABLE}]))
    with pytest.raises(SafeguardError, match="harmful requests; add"):
        frontier(points, ["guard"])
    assert frontier([], ["refusal"]) == []


def test_ratios_against_sums_by_hand_and_a_spread_of_none() -> None:
    rng = random.Random(1)
    lines = []
    for number in range(60):
        tokens, nll = rng.randint(5, 50), rng.uniform(5, 50)
        lines += [
            line("none", number, tokens=tokens, seconds=rng.uniform(1, 2), nll=nll, nll_tokens=9),
            line(
                "ecso",
                number,
                tokens=2 * tokens,
                seconds=rng.uniform(1, 4),
                nll=nll + 0.9,
                nll_tokens=9,
            ),
        ]
    lines.append(line("ecso", 99, tokens=10_000))  # nothing to be compared with
    ratios = {ratio.metric: ratio for ratio in cost_ratios(lines)}
    ratio = ratios["tokens"]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    perplexity = ratios["perplexity"]
    expected = math.exp(0.9 / 9)
    assert (perplexity.value, perplexity.low, perplexity.high) == pytest.approx((expected,) * 3)
    above, below = (
        [x.seconds or 0 for x in lines if x.defence == defence and x.seconds]
        for defence in ("ecso", "none")
    )
    seconds = ratios["seconds"]
    assert seconds.value == pytest.approx(sum(above) / sum(below))
    # the delta method's interval, of which the bootstrap's is an estimate
    residual = [a - seconds.value * b for a, b in zip(above, below, strict=True)]
    half = 1.96 * math.sqrt(sum(x * x for x in residual)) / sum(below)
    assert seconds.high - seconds.low == pytest.approx(2 * half, rel=0.15)
    assert {ratio.n for ratio in ratios.values()} == {60}


def test_a_request_s_conditions_are_resampled_together() -> None:
    rng = random.Random(2)
    once = []
    for number in range(40):
        once += [line("none", number, tokens=10), line("x", number, tokens=rng.randint(1, 30))]
    thrice = [x.model_copy(update={"condition": c}) for c in ("a", "b", "c") for x in once]
    (one,), (three,) = cost_ratios(once), cost_ratios(thrice)
    assert three.n == 40
    assert three.value == pytest.approx(one.value)
    assert three.high - three.low == pytest.approx(one.high - one.low)


def test_lines_are_written_as_they_are_read(tmp_path: Path) -> None:
    lines = [
        line("none", 1, answer="a\u2028b é 図", verdicts={"refusal": REFUSED}),
        line("default", 2, receipt=receipt(True), tokens=3, seconds=0.25, correct=True),
    ]
    path = tmp_path / "samples.jsonl"
    write_lines(path, lines)
    assert len(path.read_text("utf-8").split("\n")) == 3
    assert read_lines(path) == lines
    first = json.loads(path.read_text("utf-8").split("\n")[0])
    assert list(first) == list(Line.model_fields)
    second = json.loads(path.read_text("utf-8").split("\n")[1])
    assert second["receipt"] == receipt(True), "a receipt is kept whole, whatever is in it"
    assert first["verdicts"]["refusal"] == {
        "refused": True,
        "unsafe": None,
        "score": None,
        "note": "",
    }


def test_what_an_earlier_version_did_not_count_is_counted_when_read(tmp_path: Path) -> None:
    lines = [line("none", n, tokens=10) for n in range(3)]
    lines += [line("default", n, tokens=10, receipt=receipt(False)) for n in range(3)]
    write_results(tmp_path, Results(model="x", rows=rows(lines), time_ratio=1))
    assert read_evaluation(tmp_path).results.cost_ratios == []
    write_samples(tmp_path, lines)
    results = read_evaluation(tmp_path).results
    assert results.cost_ratios == cost_ratios(lines)
    assert results.closed_gates.answers == results.closed_gates.identical == 3


def test_findings_are_stored_and_are_of_the_rows_whatever_a_file_says() -> None:
    cells = [
        Row.count(
            [True] * yes + [False] * (100 - yes),
            defence="none",
            condition=condition,
            prompts="harmful",
            metric="attack_success",
        )
        for condition, yes in (("text", 5), ("blank", 60))
    ]
    results = Results(model="x", rows=cells, time_ratio=1)
    stored = json.loads(results.model_dump_json())
    assert stored["findings"]["gap"]["after"]["value"] == 0.6
    assert stored["cautions"]["phrases"] is True
    stored["findings"]["gap"]["after"]["value"] = 0.1
    assert Results.model_validate(stored) == results
    with pytest.raises(ValueError, match="format 3"):
        Results.model_validate(stored | {"format": 3})
    with pytest.raises(ValueError, match="surprise"):
        Results.model_validate(stored | {"surprise": 1})
