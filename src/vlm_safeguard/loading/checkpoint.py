"""What a checkpoint has to be, and why one does not load, each in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading.options import Loading

_INDEX = "model.safetensors.index.json"


def check_files(name: str, loading: Loading) -> None:
    """Refuse what is no whole checkpoint of a model, before anything of it is read.

    Args:
        name: a folder, or a Hugging Face Hub id, of which only what is not on this machine is left
            to the Hub to say.

    Raises:
        SafeguardError: one file, an adapter, weights of another format or none, a shard that is
            not there, or a folder's revision.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    path = Path(name)
    if path.suffix == ".gguf":
        raise SafeguardError(
            f"'{name}' is a GGUF file, which holds no vision-language model that transformers can "
            "load; name the checkpoint that it was made from."
        )
    if path.is_file():
        raise SafeguardError(f"'{name}' is a file; name the folder of the whole checkpoint.")
    adapter = find_adapter_config_file(name, revision=loading.revision)
    if adapter is not None:
        raise SafeguardError(
            f"'{name}' holds a PEFT adapter{_base(Path(adapter))}. Merge it into its base "
            "(merge_and_unload, then save_pretrained) and name the merged model, or name the base."
        )
    if path.is_dir():
        if loading.revision is not None:
            raise SafeguardError(
                f"'{name}' is a folder, which has no revisions; leave out --revision."
            )
        _check_folder(name, path)


def _base(adapter_config: Path) -> str:
    try:
        base = json.loads(adapter_config.read_text("utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of {base}" if base else ""


def _check_folder(name: str, folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    endings = {Path(file).suffix for file in files}
    if ".safetensors" not in endings and _INDEX not in files:
        if ".gguf" in endings:
            held = "GGUF files only, which transformers loads no vision-language model from"
        elif endings & {".bin", ".pt", ".pth", ".ckpt"}:
            held = "pickled weights only, which can run code when they are read"
        else:
            held = "no weights"
        raise SafeguardError(
            f"'{name}' holds {held}; name a folder with safetensors files, as save_pretrained "
            "writes them."
        )
    if "config.json" not in files:
        raise SafeguardError(f"'{name}' is not a checkpoint: it has no config.json.")
    if _INDEX in files and "model.safetensors" not in files:
        try:
            shards = set(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SafeguardError(f"'{name}': {_INDEX} cannot be read.") from error
        if missing := sorted(shards - files):
            raise SafeguardError(
                f"'{name}' is incomplete: {len(missing)} of its {len(shards)} files of weights are "
                f"missing, the first is {missing[0]}. Download it again."
            )


def check_complete(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights were not in its checkpoint, and so are random.

    Args:
        info: what `from_pretrained` says of the loading.

    Raises:
        SafeguardError: with how many there are, and the first.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise SafeguardError(
            f"'{name}' lacks {len(missing)} weights of the model that its config.json describes, "
            f"the first is {missing[0]}; they would be random. It is incomplete, or its config is "
            "another model's."
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, held, wanted = mismatched[0]
        raise SafeguardError(
            f"'{name}' has {len(mismatched)} weights of another shape than its config.json says: "
            f"{key} is {tuple(held)}, not {tuple(wanted)}. Its config is another model's."
        )


def why_not(name: str, loading: Loading, error: BaseException) -> str:
    """Why the model `name` did not load, in a sentence or two that say what to do."""
    return (
        hub_reason("model", name, loading.revision, error)
        or _package_reason(name, error)
        or _memory_reason(name, loading, error)
        or _other_reason(name, error)
    )


def hub_reason(what: str, name: str, revision: str | None, error: BaseException) -> str | None:
    """What the Hugging Face Hub said, if that is why the model or guard `name` did not load."""
    from huggingface_hub import errors

    kinds = [type(each) for each in _causes(error)]

    def is_a(kind: type[BaseException]) -> bool:
        return any(issubclass(each, kind) for each in kinds)

    if is_a(errors.GatedRepoError):
        return (
            f"'{name}' is gated: accept its terms at https://huggingface.co/{name}, then log in "
            "(hf auth login) or set HF_TOKEN."
        )
    if is_a(errors.RevisionNotFoundError):
        return f"'{name}' has no revision '{revision}' on the Hugging Face Hub."
    if is_a(errors.RepositoryNotFoundError):
        return (
            f"There is no {what} '{name}': it is not a folder here, and the Hugging Face Hub has "
            "none of this name. If it is private, log in (hf auth login) or set HF_TOKEN."
        )
    if is_a(errors.HFValidationError):
        return f"There is no {what} '{name}': it is neither a folder here nor a name on the Hub."
    if is_a(errors.LocalEntryNotFoundError):
        at = "" if revision is None else f" at revision '{revision}'"
        return (
            f"There is no {what} '{name}'{at} on this machine, and the Hugging Face Hub could not "
            "be reached."
        )
    if is_a(errors.HfHubHTTPError) and not is_a(errors.EntryNotFoundError):
        return f"The Hugging Face Hub did not give '{name}': {first_line(error)}"
    return None


def _package_reason(name: str, error: BaseException) -> str | None:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"'{name}' comes with its own Python code, which is not run unless you allow it: read "
            "the code, then add --trust-remote-code."
        )
    if "supported by the bitsandbytes version" in text:
        return (
            "bitsandbytes cannot use this machine's devices; leave out --load-in-4bit and "
            "--load-in-8bit, or update it: pip install -U bitsandbytes"
        )
    return None


def _memory_reason(name: str, loading: Loading, error: BaseException) -> str | None:
    if "Some modules are dispatched on the CPU or the disk" in str(error):
        return (
            f"'{name}' does not fit into the GPUs, and weights in 4 or 8 bits cannot be spread to "
            "memory and disk: take a smaller model, or leave out --load-in-4bit and "
            "--load-in-8bit."
        )
    signs = ("out of memory", "not enough memory", "can't allocate memory")
    if not any(
        isinstance(each, MemoryError) or any(sign in str(each).lower() for sign in signs)
        for each in _causes(error)
    ):
        return None
    lighter = [
        option
        for option, is_taken in (
            ("--load-in-4bit", loading.load_in_4bit or loading.load_in_8bit),
            ("--device-map auto", loading.device_map is not None),
            ("--dtype bfloat16", loading.dtype in ("bfloat16", "float16")),
        )
        if not is_taken
    ]
    advice = f"Try {' or '.join(lighter)}" if lighter else "Take a smaller model"
    return f"'{name}' does not fit into the memory there is. {advice}."


def _other_reason(name: str, error: BaseException) -> str:
    from safetensors import SafetensorError

    if any(isinstance(each, SafetensorError) for each in _causes(error)):
        return (
            f"'{name}' has a damaged or incomplete file of weights ({first_line(error)}); download "
            "it again (git lfs pull in a git clone)."
        )
    return f"'{name}' could not be loaded: {first_line(error)}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, in turn."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def first_line(error: BaseException) -> str:
    """What an error says first; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
