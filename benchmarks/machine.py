"""Where and with what it was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine(model: Any) -> dict[str, Any]:
    """Of what runs this model."""
    return machine_of(model.device.type, str(model.dtype).removeprefix("torch."))


def machine_of(device: str, dtype: str, *packages: str) -> dict[str, Any]:
    """Of what runs models there and so.

    Args:
        packages: whose versions matter, besides those that always do.
    """
    described = Path("/proc/cpuinfo")
    lines = described.read_text("utf-8").splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": device,
        "dtype": dtype,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("vlm-safeguard", "torch", "transformers", *packages)},
    }
