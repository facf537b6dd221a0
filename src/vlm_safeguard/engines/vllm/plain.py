"""Tensors as they are sent to another process: the bytes of their float32 values."""

from __future__ import annotations

import torch


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Its values, row after row."""
    return tensor.float().cpu().numpy().tobytes()


def from_bytes(values: bytes) -> torch.Tensor:
    """(n,) float32, in memory of its own."""
    return torch.frombuffer(bytearray(values), dtype=torch.float32)
