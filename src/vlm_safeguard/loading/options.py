"""How a checkpoint becomes a model: one value, from the command line to `from_pretrained`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from vlm_safeguard.errors import SafeguardError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

T = TypeVar("T")


def _option(default: T, text: str) -> T:
    """A field with what its command-line option says of itself."""
    chosen: T = field(default=default, metadata={"help": text})
    return chosen


@dataclass(frozen=True)
class Loading:
    """How a model is loaded. Every command that loads one has an option for each field.

    Raises:
        SafeguardError: there is no such dtype or device map, or two options exclude each other.
    """

    dtype: str = _option("auto", f"Weights' type: {', '.join(DTYPES)}.")
    device: str = _option(
        "auto", "Where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, mps, …"
    )
    device_map: str | None = _option(
        None, f"Spread the model over GPUs, memory and disk: {', '.join(DEVICE_MAPS)}."
    )
    load_in_4bit: bool = _option(False, "Keep the weights in 4 bits (NF4), with bitsandbytes.")
    load_in_8bit: bool = _option(False, "Keep the weights in 8 bits, with bitsandbytes.")
    revision: str | None = _option(
        None, "The model's branch, tag or commit on the Hugging Face Hub."
    )
    trust_remote_code: bool = _option(
        False, "Run the Python code that comes with the model; read it first."
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SafeguardError(
                f"There is no dtype '{self.dtype}'; choose one of {', '.join(DTYPES)}."
            )
        if self.device_map is not None and self.device_map not in DEVICE_MAPS:
            raise SafeguardError(
                f"There is no device map '{self.device_map}'; choose one of "
                f"{', '.join(DEVICE_MAPS)}, or name one device with --device."
            )
        if self.device_map is not None and self.device != "auto":
            raise SafeguardError(
                "A device map places the whole model: leave out --device, or --device-map."
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise SafeguardError(
                "Weights are kept in 4 bits or in 8, not in both: leave out --load-in-4bit or "
                "--load-in-8bit."
            )

    @property
    def weights(self) -> tuple[str, int | None, str | None]:
        """(dtype, bits, revision): what numbers depend on, wherever the model runs."""
        bits = 4 if self.load_in_4bit else 8 if self.load_in_8bit else None
        return self.dtype, bits, self.revision

    def for_another_model(self) -> Loading:
        """The same but for what is one repository's: its revision, and the trust in its code."""
        return replace(self, revision=None, trust_remote_code=False)
