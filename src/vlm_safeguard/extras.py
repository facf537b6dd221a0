"""Packages that only a part of this one needs, and the sentence for where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from vlm_safeguard.errors import SafeguardError


class MissingExtraError(SafeguardError, ImportError):
    """What was asked for needs an extra of this package that is not installed."""


def require(extra: str, *modules: str) -> None:
    """Ask for modules that `extra` brings, before any work is done that would need them.

    Raises:
        MissingExtraError: one cannot be found; the message is the command that installs it.
    """
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        raise MissingExtraError(
            f"This needs {' and '.join(missing)}: pip install 'vlm-safeguard[{extra}]'."
        )


def _is_there(module: str) -> bool:
    parent, _, _ = module.rpartition(".")  # which `find_spec` imports
    return (not parent or _is_there(parent)) and find_spec(module) is not None
