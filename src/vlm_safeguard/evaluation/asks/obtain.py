"""Getting a benchmark's files: from a local path, or from the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vlm_safeguard.errors import SafeguardError

_ON_THE_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class NotInFolderError(SafeguardError):
    """A folder that was given lacks a file of the benchmark's layout."""


def obtain(path: str | Path | None, files: Sequence[str], source: str) -> Path:
    """The local file or folder that holds a benchmark.

    Args:
        path: what exists locally, or a data set on the Hub, "owner/name" or
            "owner/name@revision", whose files are fetched into the Hub's cache.
        files: patterns of the files to fetch.
        source: the benchmark and how to get it, for messages.

    Raises:
        SafeguardError: nothing is there, or the Hub does not give it.
    """
    if path is None:
        raise SafeguardError(f"Not on the Hub in its original layout. {source}")
    local = Path(path).expanduser()
    if local.exists():
        return local
    named = _ON_THE_HUB.fullmatch(str(path))
    if named is None:
        raise SafeguardError(f"There is no {path}. {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = snapshot_download(
            named["repo"],
            repo_type="dataset",
            revision=named["revision"],
            allow_patterns=list(files),
        )
    except GatedRepoError as error:
        raise SafeguardError(
            f"The Hub gives {path} only to those who accepted its terms: do so on its page, then "
            f"log in with `hf auth login`. {source}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SafeguardError(
            f"There is no local {path}, and the Hub did not give it ({reason}). {source}"
        ) from error
    return Path(folder)


def files_in(root: Path, *patterns: str) -> list[Path]:
    """The files under a folder that match the first pattern that any does; a file is itself.

    Raises:
        NotInFolderError: none does.
    """
    if root.is_file():
        return [root]
    for pattern in patterns:
        if matches := sorted(path for path in root.glob(pattern) if path.is_file()):
            return matches
    raise NotInFolderError(f"{root} holds no {' or '.join(patterns)}.")


def file_in(root: Path, *patterns: str) -> Path:
    """The only file under a folder that matches, as `files_in` looks for it.

    Raises:
        NotInFolderError: none does.
        SafeguardError: several do.
    """
    matches = files_in(root, *patterns)
    if len(matches) > 1:
        names = ", ".join(path.name for path in matches)
        raise SafeguardError(f"{root} holds several such files ({names}); give the path of one.")
    return matches[0]
