"""Batches in a thread: who shares one, what is kept, and what happens when one fails."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from vlm_safeguard.evaluation.answers import batches
from vlm_safeguard.evaluation.answers.batches import Position, Request, submit
from vlm_safeguard.evaluation.answers.journal import Journal
from vlm_safeguard.evaluation.answers.reply import Reply
from vlm_safeguard.model.conversation import Chat, chat_of, request_text

Batches = list[list[int]]


def recorder(seen: Batches, *, fails: tuple[int, ...] = ()) -> batches.Run:
    """A run that notes its batches and answers n with n²; a batch that holds one of `fails`
    fails."""

    def run(chats: list[Chat]) -> list[Reply]:
        numbers = [int(request_text(chat)) for chat in chats]
        seen.append(numbers)
        if bad := [n for n in numbers if n in fails]:
            raise ValueError(f"cannot square {bad[0]}")
        return [Reply(text=str(n * n), tokens=n, batch=len(chats), seconds=0.1) for n in numbers]

    return run


def ask(
    numbers: list[int], total: int, run: batches.Run, **options: Any
) -> dict[int, Future[Reply]]:
    return {
        n: submit(one(n, "line", run, position=Position("set", n, total), **options))
        for n in numbers
    }


def one(n: int, group: str, run: batches.Run, **options: Any) -> Request:
    return Request(chat=chat_of(str(n)), group=group, run=run, **options)


def answers(futures: dict[int, Future[Reply]]) -> dict[int, int]:
    wait(futures.values(), timeout=30)
    return {n: int(future.result(timeout=0).text) for n, future in futures.items()}


def test_batches_depend_on_places_and_not_on_who_comes_first() -> None:
    seen: Batches = []
    order = [7, 3, 0, 9, 4, 1, 8, 2, 6, 5]
    found = answers(ask(order, 10, recorder(seen), most=4))
    assert found == {n: n * n for n in range(10)}
    assert sorted(seen) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_without_places_a_batch_fills_up_or_goes_after_a_short_wait() -> None:
    seen: Batches = []
    run = recorder(seen)
    futures = [submit(one(n, "unplaced", run, most=3)) for n in range(5)]
    wait(futures, timeout=30)
    assert seen == [[0, 1, 2], [3, 4]]


def test_different_options_do_not_share_a_batch() -> None:
    seen: Batches = []
    run = recorder(seen)
    futures = [submit(one(n, f"l{n % 2}", run, most=2)) for n in range(4)]
    wait(futures, timeout=30)
    assert sorted(seen) == [[0, 2], [1, 3]]


def test_one_that_fails_harms_no_other() -> None:
    seen: Batches = []
    futures = ask(list(range(4)), 4, recorder(seen, fails=(2,)), most=4)
    wait(futures.values(), timeout=30)
    with pytest.raises(ValueError, match="cannot square 2"):
        futures.pop(2).result()
    assert answers(futures) == {0: 0, 1: 1, 3: 9}
    assert seen == [[0, 1, 2, 3], [0], [1], [2], [3]]  # tried again once, and no more


def test_what_was_kept_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    seen: Batches = []
    first = ask([0, 1, 2, 3], 6, recorder(seen), most=4, journal=Journal(path))
    assert answers(first) == {0: 0, 1: 1, 2: 4, 3: 9}
    again: Batches = []
    futures = ask(list(range(6)), 6, recorder(again), most=4, journal=Journal(path))
    assert answers(futures) == {n: n * n for n in range(6)}
    assert all(futures[n].result() == first[n].result() for n in first)
    assert again == [[4, 5]]


def test_a_line_that_was_cut_off_is_dropped_whole(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    journal = Journal(path)
    journal.add({"a": {"n": 1}})
    journal.add({"b": {"n": 2}, "c": {"n": 3}})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    cut = Journal(path)
    assert (cut.get("a"), cut.get("b"), cut.get("c")) == ({"n": 1}, None, None)
    cut.add({"b": {"n": 5}})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"a": {"n": 1}},
        {"b": {"n": 5}},
    ]


def test_nothing_is_used_that_could_not_be_kept(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    futures = ask([0, 1], 2, recorder([]), most=2, journal=Journal(blocked / "answers.jsonl"))
    wait(futures.values(), timeout=30)
    for future in futures.values():
        assert isinstance(future.exception(), OSError)


def test_a_second_event_loop_does_not_wait_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "IDLE", 3600.0)  # who waits for more requests waits too long
    monkeypatch.setattr(batches, "PATIENCE", 3600.0)

    async def square(n: int) -> int:
        future = submit(one(n, "loops", recorder([]), most=1))
        while not future.done():
            await asyncio.sleep(0.001)
        return int(future.result().text)

    assert [asyncio.run(asyncio.wait_for(square(n), timeout=60)) for n in range(3)] == [0, 1, 4]


def test_who_has_gone_is_not_answered() -> None:
    seen: Batches = []
    futures = ask([0, 1], 3, recorder(seen), most=3)
    futures.pop(0).cancel()
    futures |= ask([2], 3, recorder(seen), most=3)
    assert answers(futures) == {1: 1, 2: 4}
    assert seen == [[1, 2]]
