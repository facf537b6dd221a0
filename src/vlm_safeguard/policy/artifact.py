"""A guard's files: `guard.safetensors`, `guard_config.json` and a model card. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.policy.format3 import from_format_3
from vlm_safeguard.policy.gate import Gate
from vlm_safeguard.policy.generation_prompt import GenerationPrompt
from vlm_safeguard.policy.options import FitOptions
from vlm_safeguard.policy.response import Response
from vlm_safeguard.policy.sentences import Sentences
from vlm_safeguard.policy.text_view import TextView
from vlm_safeguard.policy.tolerances import Tolerances

FORMAT = 4
WEIGHTS_NAME = "guard.safetensors"
CONFIG_NAME = "guard_config.json"


class Provenance(BaseModel):
    """Where a guard comes from: the model and the data it was fitted on, and with what.

    Attributes:
        adapters: names of the adapters that were active at fitting.
        options: what was chosen at fitting; None where that was not written down (format 3).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_name: str
    model_revision: str | None
    model_type: str
    architecture: str
    hidden_size: int
    num_layers: int
    decoder_path: str
    chat_template_sha256: str
    estimator: str
    anchor_pairs: int
    anchors_sha256: str
    calibration_requests: int
    calibration_sha256: str
    adapters: tuple[str, ...] = ()
    options: FitOptions | None
    versions: dict[str, str]


class Config(BaseModel):
    """`guard_config.json`.

    Attributes:
        other_prefixes: of refusals in other languages; earlier guards have none.
        sentences: last, as they are many numbers; earlier guards have none.
        tolerances: of the fingerprint; None where the model is known by its embeddings (format 3).
    """

    model_config = ConfigDict(extra="forbid")

    format: int
    provenance: Provenance
    policy_sha256: str | None
    text_view: TextView
    generation_prompt: GenerationPrompt | None
    layers: list[int]
    rank: int
    refusal_prefix: list[int]
    other_prefixes: list[list[int]] = []
    response: Response
    random_seed: int | None
    edit: dict[str, Any]
    gate: Gate
    held_out_auroc: list[float]
    tolerances: Tolerances | None
    sentences: Sentences | None = None


def write(folder: Path, config: Config, tensors: dict[str, torch.Tensor]) -> None:
    """Write a guard's files into `folder`, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(config.model_dump_json(indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(config), "utf-8")


def read(source: str | Path, revision: str | None) -> tuple[Config, dict[str, torch.Tensor]]:
    """A guard's files, from a folder or from a repository on the Hugging Face Hub.

    Raises:
        SafeguardError: nothing there, or files that are incomplete, corrupt or of another format.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source), revision)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise SafeguardError(f"{source} is not a guard: it has no {name}.")
    try:
        config = _config(source, (folder / CONFIG_NAME).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS_NAME)
    except ValidationError as error:
        first = str(error).splitlines()[1:3] or [str(error)]
        raise SafeguardError(
            f"{source}/{CONFIG_NAME} cannot be read: {' '.join(map(str.strip, first))}"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SafeguardError(f"{source}/{CONFIG_NAME} cannot be read: {error}") from error
    except (SafetensorError, OSError) as error:
        raise SafeguardError(f"{source}/{WEIGHTS_NAME} is corrupt: {error}") from error
    return config, tensors


def _config(source: str | Path, text: str) -> Config:
    """A config of this format, or of the one before.

    Raises:
        SafeguardError: of any other.
    """
    fields = json.loads(text)
    number = fields.get("format") if isinstance(fields, dict) else None
    if number == 3:
        fields = from_format_3(fields)
    elif isinstance(number, int) and number != FORMAT:
        raise SafeguardError(
            f"{source} has guard format {number}; this version reads 3 and {FORMAT}. Fit the "
            "guard again, or install the version of vlm-safeguard that wrote it."
        )
    return Config.model_validate_json(json.dumps(fields))


def _card(config: Config) -> str:
    """The model card of a guard."""
    made = config.provenance
    window = f"{config.layers[0]}–{config.layers[-1]} of {made.num_layers}"
    criteria = ", ".join(f"`{criterion.name}`" for criterion in config.gate)
    adapters = f", with the adapters {', '.join(made.adapters)}" if made.adapters else ""
    return (
        f"---\nlibrary_name: vlm-safeguard\nbase_model: {made.model_name}\n"
        "tags: [vlm-safeguard, safety, activation-steering]\n---\n\n"
        f"# Safety guard for {made.model_name}\n\n"
        "Keeps the model as safe with an image as it is without one. Edit "
        f"`{config.edit['name']}` on layers {window}, rank {config.rank}, behind a "
        f"gate ({criteria}); fitted on {made.anchor_pairs} anchor pairs and "
        f"{made.calibration_requests} calibration requests, text only"
        f"{adapters}.\n\n"
        "```python\nfrom vlm_safeguard import Guard\n\n"
        'guard = Guard.from_pretrained("THIS_REPOSITORY")\n'
        "with guard.attach(model):\n    model.generate(**inputs)\n```\n"
    )


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = hf_hub_download(repo_id, name, revision=revision)
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SafeguardError(
            f"There is no folder '{repo_id}', and no guard by that name could be loaded from the "
            f"Hugging Face Hub: {reason}"
        ) from error
    return Path(path).parent
