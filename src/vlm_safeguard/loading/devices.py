"""Devices by name: the accelerator that PyTorch sees, one that is named, or the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_safeguard.errors import SafeguardError

if TYPE_CHECKING:
    import torch


def find_device(name: str) -> torch.device:
    """A device of this machine.

    Args:
        name: `auto` (the accelerator where there is one, else the CPU), `cpu`, `cuda`, `cuda:1`, …

    Raises:
        SafeguardError: this machine has no such device; with those that it has.
    """
    import torch

    accelerator = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator else 0
    if (
        device is not None
        and accelerator
        and device.type == accelerator.type
        and (device.index or 0) < count
    ):
        return device
    there = ["cpu", *(f"{accelerator.type}:{number}" for number in range(count) if accelerator)]
    raise SafeguardError(
        f"The device '{name}' cannot be used: PyTorch {torch.__version__} sees "
        f"{', '.join(there)} on this machine. Name one of these, or auto."
    )
