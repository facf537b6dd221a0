"""The safety steering direction (SSD): what separates harmful from harmless, layer by layer.

VLM-Guard (arXiv 2502.10486), section 3: the matrix of differences of paired anchors' last-token
states, A_l = U Σ Wᵀ; the direction is spanned by the first right singular vectors of A_l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of every layer, with what is needed to judge and to use them.

    Attributes:
        vectors: (layers, rank, hidden) float32; rows orthonormal, oriented towards harmful.
        spectrum: (layers, k) singular values of A_l, largest first; all of them, not just `rank`.
        harmful_mean: (layers, hidden) mean state of the harmful anchors.
        harmless_mean: (layers, hidden) mean state of the harmless anchors.
        auroc: (layers,) AUROC of anchors scored by directions fitted without them.
    """

    vectors: torch.Tensor
    spectrum: torch.Tensor
    harmful_mean: torch.Tensor
    harmless_mean: torch.Tensor
    auroc: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of directions a layer."""
        return self.vectors.shape[1]

    @property
    def energy_shares(self) -> torch.Tensor:
        """(layers, k) each singular value's square, as a share of its layer's sum of squares."""
        squares = self.spectrum.square()
        return squares / squares.sum(1, keepdim=True)

    def harm_score(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """Centred first coordinate: +1 at the harmful anchors' mean, −1 at the harmless one's.

        Args:
            states: (requests, hidden) states of one layer, on the directions' device.
            layer: which one.

        Returns:
            (requests,), float32.
        """
        middle, half = self._scale
        return (states.float() @ self.vectors[layer, 0] - middle[layer]) / half[layer]

    @cached_property
    def _scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(layers,) where the first coordinate scores 0, and what it gains up to a score of 1."""
        harmful, harmless = (
            torch.einsum("ld,ld->l", mean, self.vectors[:, 0])
            for mean in (self.harmful_mean, self.harmless_mean)
        )
        return (harmful + harmless) / 2, (harmful - harmless) / 2

    def harm_scores(self, states: torch.Tensor) -> torch.Tensor:
        """`harm_score` for every layer: (requests, layers, hidden) → (requests, layers)."""
        return torch.stack(
            [self.harm_score(states[:, layer], layer) for layer in range(states.shape[1])], dim=1
        )

    def to(self, device: torch.device | str) -> Directions:
        """The same directions on another device."""
        return Directions(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def fit_directions(
    harmful: torch.Tensor,
    harmless: torch.Tensor,
    rank: int,
    *,
    held_out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Directions:
    """Directions from paired last-token states.

    The sign of a singular vector is arbitrary; each is oriented so that the mean of A_l·v is ≥ 0,
    that is, so that a larger coordinate means more harmful.

    Args:
        harmful: (pairs, layers, hidden) states of the harmful anchors.
        harmless: (pairs, layers, hidden) states of their partners.
        rank: directions to keep for each layer; at most the number of pairs.
        held_out: their `held_out_scores`, where these are known already.

    Raises:
        ValueError: the shapes differ, the rank does not fit, or a state is not finite.
    """
    if harmful.shape != harmless.shape or harmful.dim() != 3:
        raise ValueError(f"paired states expected, got {harmful.shape} and {harmless.shape}")
    pairs, _, hidden = harmful.shape
    if not 1 <= rank <= min(pairs, hidden):
        raise ValueError(f"rank {rank} needs at least that many pairs; there are {pairs}")
    if not (torch.isfinite(harmful).all() and torch.isfinite(harmless).all()):
        raise ValueError("a hidden state is not finite (NaN or infinite)")
    positive, negative = held_out or held_out_scores(harmful, harmless)
    return _fit(harmful, harmless, rank, auroc(positive, negative))


def held_out_scores(
    harmful: torch.Tensor, harmless: torch.Tensor, folds: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Harm scores of every anchor under directions fitted on the other folds' anchors.

    Args:
        harmful: (pairs, layers, hidden) states of the harmful anchors.
        harmless: (pairs, layers, hidden) states of their partners.
        folds: that the anchors are dealt into, in turn.

    Returns:
        Two (pairs, layers) tensors, harmful and harmless.
    """
    positive, negative = torch.empty(harmful.shape[:2]), torch.empty(harmful.shape[:2])
    fold_of = torch.arange(len(harmful)) % folds
    for fold in range(min(folds, len(harmful))):
        out = fold_of == fold
        fitted = _fit(harmful[~out], harmless[~out], 1, torch.empty(0))
        positive[out] = fitted.harm_scores(harmful[out])
        negative[out] = fitted.harm_scores(harmless[out])
    return positive, negative


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Probability that a positive scores above a negative, ties counting half, per column.

    A score that is not a number is above none and has none below it.

    Args:
        positive: (n, columns) scores.
        negative: (m, columns) scores.

    Returns:
        (columns,) values in 0–1.
    """
    scores = positive.T.masked_fill(positive.T.isnan(), -torch.inf).contiguous()
    ordered = negative.T.masked_fill(negative.T.isnan(), torch.inf).contiguous().sort(dim=1).values
    below, upto = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    return (below + upto).double().mean(1).float() / (2 * len(negative))


def choose_layers(count: int, first: float, last: float) -> tuple[int, ...]:
    """The layers to edit: a contiguous block, by default from 27 % to 90 % of the depth.

    Measured on the Pocket VLM's development requests with a blank image (30 layers, n = 45; 93 %
    refused without an image, 27 % unguarded), the last prompt token restored: layers 8–27 with
    rank 32 gave 87 %, rank 5 73 %, rank 2 62 %; in all dimensions, 8–27 gave 91 %, 12–27 89 %,
    15–27 80 %, 20–27 71 %. Early layers count although harm is not yet legible in them.

    Args:
        count: of the model's layers; at least the last one is left alone where there are several.
        first: share of the depth, 0–1, where the block begins; `last` likewise.
    """
    start = round(first * count)
    stop = max(start, min(count - 2, round(last * count)))
    return tuple(range(start, stop + 1))


def legible_layers(
    directions: Directions, layers: Sequence[int], near_best: float
) -> tuple[int, ...]:
    """Those of `layers` whose held-out AUROC is that near to the best: the gate reads these."""
    best = max(float(directions.auroc[layer]) for layer in layers)
    return tuple(layer for layer in layers if float(directions.auroc[layer]) >= best - near_best)


def legible_before(directions: Directions, first: int, legible: float) -> int | None:
    """The layer up to `first` that tells harm best, if its held-out AUROC is at least `legible`.

    A gate that reads a layer before the edit is no use, and costs false positives, where harm is
    not yet legible there: None then.
    """
    layer = int(directions.auroc[: first + 1].argmax())
    return layer if float(directions.auroc[layer]) >= legible else None


def whole_space(directions: Directions) -> Directions:
    """The same with directions added until they span all dimensions: a control for `rank`."""
    layers, rank, hidden = directions.vectors.shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(layers, hidden, hidden - rank, generator=generator).double()
    basis = torch.linalg.qr(torch.cat([directions.vectors.mT.double(), noise], dim=-1)).Q.mT
    vectors = torch.cat([directions.vectors, basis[:, rank:].float()], dim=1)
    return replace(directions, vectors=vectors)


def random_basis(directions: Directions, seed: int) -> torch.Tensor:
    """(layers, rank, hidden) random orthonormal rows, oriented alike: a control for `vectors`."""
    generator = torch.Generator().manual_seed(seed)
    layers, rank, hidden = directions.vectors.shape
    noise = torch.randn(layers, hidden, rank, generator=generator)
    basis: torch.Tensor = torch.linalg.qr(noise).Q.mT
    towards = torch.einsum("lmd,ld->lm", basis, directions.harmful_mean - directions.harmless_mean)
    return basis * torch.where(towards < 0, -1.0, 1.0)[..., None]


def _fit(
    harmful: torch.Tensor, harmless: torch.Tensor, rank: int, held_out_auroc: torch.Tensor
) -> Directions:
    harmful, harmless = harmful.float(), harmless.float()
    matrices = (harmful - harmless).transpose(0, 1)
    _, values, rows = torch.linalg.svd(matrices, full_matrices=False)
    vectors = rows[:, :rank].contiguous()
    towards = torch.einsum("lnd,lmd->lm", matrices, vectors)
    return Directions(
        vectors=vectors * torch.where(towards < 0, -1.0, 1.0)[..., None],
        spectrum=values,
        harmful_mean=harmful.mean(0),
        harmless_mean=harmless.mean(0),
        auroc=held_out_auroc,
    )
