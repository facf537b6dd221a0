"""A few of a tensor's entries, by which it is known again."""

from __future__ import annotations

import torch


def spread_entries(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) of a tensor's entries, (entries,) where it has fewer; a view where contiguous.

    The step is odd and a little less than what would divide the tensor evenly, so that a row's
    length seldom divides it: the entries spread over rows and columns.
    """
    flat = tensor.detach().reshape(-1)
    step = int(flat.numel() / count * 0.98) | 1
    return flat[::step][:count]
