"""Guards by name: a folder, a repository on the Hugging Face Hub, or one fitted now."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading.checkpoint import hub_reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

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
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.pocket import FAMILY

    if source is not None:
        return read_guard(source)
    if name not in FAMILY:
        print(
            "No --guard given: fitting one for this run (vlm-safeguard fit keeps it).",
            file=sys.stderr,
        )
        return Guard.fit(model, processor)
    return kept_guard(name, model, processor)


def kept_guard(name: str, model: PreTrainedModel, processor: ProcessorMixin) -> Guard:
    """The guard that was fitted for this model before; fitted now, and kept, where none fits it.

    Args:
        name: of the model.
    """
    from vlm_safeguard.guard import Guard
    from vlm_safeguard.model.backbone import Backbone

    kept = _kept_folder(name, model)
    if (kept / "guard_config.json").is_file():
        try:
            guard = Guard.from_pretrained(kept)
            guard.check_fits(Backbone.of(model))
            return guard
        except SafeguardError as error:
            print(f"The guard in {kept} is made anew: {error}", file=sys.stderr)
    print(f"Fitting a guard for '{name}', once …", file=sys.stderr)
    guard = Guard.fit(model, processor)
    guard.save_pretrained(kept)
    return guard


def _kept_folder(name: str, model: PreTrainedModel) -> Path:
    """In the cache, for a model's name, weights and dtype, and what guards are fitted from."""
    from vlm_safeguard import __version__
    from vlm_safeguard.pocket import FAMILY
    from vlm_safeguard.pocket.base import cache_folder
    from vlm_safeguard.pocket.model import fingerprint
    from vlm_safeguard.policy.artifact import FORMAT

    if name in FAMILY:
        short, weights = name, fingerprint(name)
    else:
        place = str(Path(name).resolve()) if Path(name).is_dir() else name
        commit = getattr(model.config, "_commit_hash", None)
        short = Path(name).name
        weights = hashlib.sha256(f"{place}@{commit}".encode()).hexdigest()
    kind = f"{weights[:12]}-{str(model.dtype).removeprefix('torch.')}"
    return cache_folder() / f"{short}-guard-{__version__}-format{FORMAT}-{_defaults()[:12]}-{kind}"


def _defaults() -> str:
    """SHA-256, in hex, of what a guard is fitted from where nothing else is asked for."""
    from vlm_safeguard.anchors import shipped_files
    from vlm_safeguard.fit.policy import DEFAULT_GATE
    from vlm_safeguard.policy.options import FitOptions
    from vlm_safeguard.policy.response import DEFAULT_RESPONSE

    chosen = [FitOptions.of({}).model_dump_json(), DEFAULT_GATE, DEFAULT_RESPONSE]
    data = [path.read_text("utf-8") for path in shipped_files()]
    return hashlib.sha256("\n".join([*chosen, *data]).encode()).hexdigest()
