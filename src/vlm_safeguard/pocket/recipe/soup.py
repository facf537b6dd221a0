"""The mean of several alignments of one language model (a model soup, arXiv 2203.05482).

What the mean of the shipped weights gave is in `docs/reference-vlms.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mean_updates(
    alignments: Sequence[dict[str, torch.Tensor]], rank: int
) -> dict[str, torch.Tensor]:
    """The updates of this rank that are nearest to the mean of several, by truncated SVD.

    Args:
        alignments: `<module>.a` (rank × in) and `<module>.b` (out × rank) each, as
            `low_rank_updates` gives them; their ranks may differ.
    """
    mean = {}
    for name in alignments[0]:
        if not name.endswith(".a"):
            continue
        module = name.removesuffix(".a")
        tall = torch.cat([each[f"{module}.b"].float() for each in alignments], 1) / len(alignments)
        wide = torch.cat([each[f"{module}.a"].float() for each in alignments])
        left, first = torch.linalg.qr(tall)  # so that no (out × in) matrix has to be decomposed
        right, second = torch.linalg.qr(wide.mT)
        u, values, v = torch.linalg.svd(first @ second.mT, full_matrices=False)
        root = values[:rank].sqrt()
        mean[f"{module}.a"] = root[:, None] * (v[:rank] @ right.mT)
        mean[f"{module}.b"] = left @ u[:, :rank] * root
    return mean
