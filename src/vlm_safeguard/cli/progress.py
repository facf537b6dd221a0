"""How far a long measurement has come: a bar, or lines where nobody watches a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 30.0  # seconds between lines


@contextmanager
def progress_bar(screen: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar while the block runs; what it gives takes what is done now, done and in all."""
    if not screen.is_terminal:
        yield _in_lines(screen)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=screen,
    ) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(
            task, description=what, completed=done, total=total
        )


def _in_lines(screen: Console) -> Callable[[str, int, int], None]:
    """Prints a line where something else begins, and now and then."""
    begun = time.monotonic()
    shown, printed = "", 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal shown, printed
        seconds = time.monotonic() - begun
        if what == shown and seconds - printed < _EVERY:
            return
        shown, printed = what, seconds
        screen.print(f"{seconds:6.0f} s  {what}  {done}/{total}", markup=False, highlight=False)

    return report
