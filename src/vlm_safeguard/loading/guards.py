"""Guards by name: a folder, a repository on the Hugging Face Hub, or one fitted now."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading.checkpoint import hub_reason

if TYPE_CHECKING:
    from vlm_safeguard.guard import Guard


def read_guard(source: str | Path) -> Guard:
    """The guard in a folder or on the Hugging Face Hub.

    Args:
        source: a folder, `owner/name`, or `owner/name@revision`.

    Raises:
        SafeguardError: nothing there, or not a guard.
    """
    from vlm_safeguard.guard import Guard

    if Path(source).is_dir():
        return Guard.from_pretrained(source)
    repository, _, revision = str(source).partition("@")
    try:
        return Guard.from_pretrained(repository, revision=revision or None)
    except SafeguardError as error:
        reason = hub_reason("guard", repository, revision or None, error)
        if reason is None:
            raise
        raise SafeguardError(reason) from error


def load_guard(source: str | Path | None, name: str, model: Any, processor: Any) -> Guard:
    """The guard that `source` names, as `read_guard` does; without one, fitted now.

    A reference VLM's is kept in the cache, so that it is fitted once for each dtype.

    Args:
        name: of the model.
    """
    from vlm_safeguard import __version__
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.pocket import FAMILY
    from vlm_safeguard.pocket.base import cache_folder
    from vlm_safeguard.pocket.model import fingerprint
    from vlm_safeguard.policy.artifact import FORMAT

    if source is not None:
        return read_guard(source)
    if name not in FAMILY:
        print(
            "No --guard given: fitting one for this run (vlm-safeguard fit keeps it).",
            file=sys.stderr,
        )
        return Guard.fit(model, processor)
    kind = f"{fingerprint(name)[:12]}-{str(model.dtype).removeprefix('torch.')}"
    kept = cache_folder() / f"{name}-guard-{__version__}-format{FORMAT}-{kind}"
    if (kept / "guard_config.json").is_file():
        return Guard.from_pretrained(kept)
    print(f"Fitting a guard for the {FAMILY[name].title}, once …", file=sys.stderr)
    guard = Guard.fit(model, processor)
    guard.save_pretrained(kept)
    return guard
