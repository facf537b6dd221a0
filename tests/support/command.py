"""The command line, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Finished(NamedTuple):
    """How a command ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[..., Finished]


def run_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object
) -> Finished:
    """`vlm-safeguard` with these arguments."""
    from vlm_safeguard.cli import main  # the core is tested without typer, too

    monkeypatch.setattr(sys, "argv", ["vlm-safeguard", *map(str, arguments)])
    capfd.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Finished(code, *capfd.readouterr())
