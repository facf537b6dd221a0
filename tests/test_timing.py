"""Ratios of times, against clocks that are made up."""

from __future__ import annotations

from itertools import count

import pytest

from vlm_safeguard.timing import Ratio, interleave, seconds, time_ratio


def test_ratios_are_of_neighbours_and_the_order_alternates() -> None:
    calls: list[str] = []
    plain_times, other_times = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 3.0, 2.0, 8.0])

    def plain() -> float:
        calls.append("plain")
        return next(plain_times)

    def other() -> float:
        calls.append("other")
        return next(other_times)

    ratio = Ratio(2.0, 1.0, 3.0, 3, (1.5, 2.5))  # of 3/1, 2/2, 8/4
    assert time_ratio(plain, other, pairs=3) == ratio
    assert calls[2:] == ["plain", "other", "other", "plain", "plain", "other"]


def test_one_pair_is_all_there_is() -> None:
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5, 1, (1.5, 1.5))


def test_rounds_go_forwards_and_backwards() -> None:
    calls = count()
    found = interleave({name: lambda: next(calls) for name in "abc"}, rounds=3)
    assert found == {"a": [3, 8, 9], "b": [4, 7, 10], "c": [5, 6, 11]}  # 0–2 warm up


def test_seconds_are_those_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(0.0, 2.5)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert seconds(lambda: None) == 2.5
