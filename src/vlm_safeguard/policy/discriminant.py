"""Linear discriminants: the direction of each layer that tells harmful requests best.

The safety steering direction is where anchors differ most; a discriminant also knows how requests
of either kind vary, and looks where that does not drown the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product

import torch

from vlm_safeguard.policy.directions import auroc
from vlm_safeguard.progress import bar


@dataclass(frozen=True, eq=False)
class Discriminant:
    """Of every layer, a score wᵀh − b of a request's last-token state h.

    Attributes:
        weights: (layers, hidden) float32, w.
        offset: (layers,) float32, b. The harmful requests' mean scores +1, the harmless ones' −1.
    """

    weights: torch.Tensor
    offset: torch.Tensor

    def score(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """(requests,) float32, of (requests, hidden) states of one layer."""
        return states.float() @ self.weights[layer] - self.offset[layer]

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """`score` for every layer: (requests, layers, hidden) → (requests, layers)."""
        return torch.einsum("nld,ld->nl", states.float(), self.weights) - self.offset

    def to(self, device: torch.device | str) -> Discriminant:
        """The same on another device."""
        return Discriminant(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A discriminant whose shrinkage and layers were chosen on requests that it had not seen.

    Attributes:
        discriminant: of all requests.
        shrinkage: the share δ that was best.
        layers: that tell harm about as well as the best one; their scores are averaged.
        auroc: (layers,) held out, with that shrinkage.
        harmful: (n,) averaged scores of the harmful requests, held out.
        harmless: (m,) likewise.
    """

    discriminant: Discriminant
    shrinkage: float
    layers: tuple[int, ...]
    auroc: torch.Tensor
    harmful: torch.Tensor
    harmless: torch.Tensor


def fit_discriminant(
    harmful: torch.Tensor, harmless: torch.Tensor, shrinkage: float
) -> Discriminant:
    """Fisher's discriminant w = Σ⁻¹(μ₊ − μ₋), Σ the covariance within the classes, shrunk.

    Σ = (1 − δ) S + δ·tr(S)/d·I (Friedman 1989, "Regularized discriminant analysis", eq. 18). It is
    solved among the dimensions or, where these are more, among the requests (Woodbury).

    Args:
        harmful: (n, layers, hidden) last-token states.
        harmless: (m, layers, hidden).
        shrinkage: δ, above 0 and at most 1.

    Raises:
        ValueError: the shapes do not fit, a class has fewer than two, or a state is not finite.
    """
    _check(harmful, harmless)
    pairs = [
        _weights(harmful[:, layer], harmless[:, layer], [shrinkage])
        for layer in range(harmful.shape[1])
    ]
    return Discriminant(
        torch.stack([weights[0] for weights, _ in pairs]).float(),
        torch.stack([offset[0] for _, offset in pairs]).float(),
    )


def choose_discriminant(
    harmful: torch.Tensor,
    harmless: torch.Tensor,
    fold_of: tuple[torch.Tensor, torch.Tensor],
    shrinkages: Sequence[float],
    near_best: float,
) -> Shrunk:
    """The discriminant with the shrinkage and the layers that tell requests of other folds best.

    Ledoit and Wolf's closed form for δ takes requests as independent, and wrapped or translated
    ones are not: on the Pocket VLM it chose far too little.

    Args:
        harmful: (n, layers, hidden) states.
        harmless: (m, layers, hidden) states.
        fold_of: (n,) and (m,) the fold of each; what is a request in other words shares its fold.
        shrinkages: to choose from.
        near_best: by how much a layer's held-out AUROC may be below the best.

    Raises:
        ValueError: as for `fit_discriminant`.
    """
    _check(harmful, harmless)
    positive, negative = held_out_scores(harmful, harmless, fold_of, shrinkages)
    tried = []
    for index, shrinkage in enumerate(shrinkages):
        each = auroc(positive[index], negative[index])
        layers = tuple((each >= each.max() - near_best).nonzero()[:, 0].tolist())
        means = [scores[index][:, list(layers)].mean(1) for scores in (positive, negative)]
        together = float(auroc(*(mean[:, None] for mean in means)))
        tried.append((together, shrinkage, layers, each, means))
    _, shrinkage, layers, each, means = max(tried, key=lambda choice: choice[0])
    return Shrunk(fit_discriminant(harmful, harmless, shrinkage), shrinkage, layers, each, *means)


def held_out_scores(
    harmful: torch.Tensor,
    harmless: torch.Tensor,
    fold_of: tuple[torch.Tensor, torch.Tensor],
    shrinkages: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of every request under discriminants fitted without its fold.

    Args:
        harmful: (n, layers, hidden) states.
        harmless: (m, layers, hidden) states.
        fold_of: (n,) and (m,) the fold of each.
        shrinkages: one discriminant for each.

    Returns:
        (shrinkages, n, layers) of the harmful ones, and (shrinkages, m, layers).
    """
    classes = harmful, harmless
    positive, negative = (torch.empty(len(shrinkages), *x.shape[:2]) for x in classes)
    folds = sorted({*fold_of[0].tolist(), *fold_of[1].tolist()})
    with bar(len(folds) * harmful.shape[1], "discriminants", "layer") as shown:
        for fold, layer in product(folds, range(harmful.shape[1])):
            out = [each == fold for each in fold_of]
            seen = [x[~left, layer] for x, left in zip(classes, out, strict=True)]
            weights, offset = _weights(seen[0], seen[1], shrinkages)
            for scores, x, left in zip((positive, negative), classes, out, strict=True):
                judged = x[left, layer].double() @ weights.mT - offset
                scores[:, left, layer] = judged.mT.float()
            shown.update()
    return positive, negative


def _weights(
    harmful: torch.Tensor, harmless: torch.Tensor, shrinkages: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(shrinkages, hidden) weights and (shrinkages,) offsets, of (n, hidden) states a class."""
    classes = harmful.double(), harmless.double()
    high, low = (states.mean(0) for states in classes)
    centred = torch.cat([classes[0] - high, classes[1] - low])
    difference = high - low
    n, d = centred.shape
    few = n < d
    gram = centred @ centred.mT if few else centred.mT @ centred
    variance = float(gram.diagonal().sum()) / (n * d)
    if variance <= 0:
        raise ValueError("the states do not vary, so there is nothing to tell them by")
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    along = centred @ difference
    weights = []
    for shrinkage in shrinkages:
        ridge, share = shrinkage * variance, (1 - shrinkage) / n
        factor = torch.linalg.cholesky(share * gram + ridge * identity)
        # w but for its length, which is set next
        if few:
            w = difference - centred.mT @ _solved(factor, share * along)
        else:
            w = _solved(factor, difference)
        weights.append(w * 2 / (w @ difference))
    together = torch.stack(weights)
    return together, together @ (high + low) / 2


def _solved(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve (L Lᵀ) x = right, by the factor L."""
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def _check(harmful: torch.Tensor, harmless: torch.Tensor) -> None:
    if harmful.dim() != 3 or harmful.shape[1:] != harmless.shape[1:]:
        raise ValueError(f"states of two classes expected, got {harmful.shape}, {harmless.shape}")
    if min(len(harmful), len(harmless)) < 2:
        raise ValueError("a covariance needs at least two requests of each class")
    if not (torch.isfinite(harmful).all() and torch.isfinite(harmless).all()):
        raise ValueError("a hidden state is not finite (NaN or infinite)")
