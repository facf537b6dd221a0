"""Progress of a suite that inspect-ai runs, defence by defence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from inspect_ai.hooks import Hooks, SampleEnd, hooks

#: Called with (what is running, parts done, parts in all).
Report = Callable[[str, int, int], None]


class Progress:
    """How many of a suite's answers are there.

    Those taken from the logs count once their defence is through.
    """

    def __init__(self, total: int, report: Report) -> None:
        """Answers in all, and who is told of each."""
        self._total, self._report = total, report
        self._name, self._done, self._before, self._size = "", 0, 0, 0

    def start(self, name: str, size: int) -> None:
        """The next defence, which has this many answers."""
        self._name, self._before = name, self._before + self._size
        self._size, self._done = size, 0
        self._tell()

    def advance(self) -> None:
        """One more answer is there; a sample that is tried again is counted again."""
        self._done = min(self._done + 1, self._size)
        self._tell()

    def finish(self) -> None:
        """All answers of the defence are there."""
        self._done = self._size
        self._tell()

    def _tell(self) -> None:
        self._report(self._name, self._before + self._done, self._total)


_current: Progress | None = None


@contextmanager
def following(progress: Progress) -> Iterator[Progress]:
    """While open, inspect-ai's samples advance this progress, and no other one."""
    global _current
    _current = progress
    try:
        yield progress
    finally:
        _current = None


@hooks(name="vlm_safeguard_progress", description="Advances a suite's progress by each sample.")
class _Samples(Hooks):
    def enabled(self) -> bool:
        return _current is not None

    async def on_sample_end(self, data: SampleEnd) -> None:
        if _current is not None:
            _current.advance()
