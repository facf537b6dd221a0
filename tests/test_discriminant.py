"""Shrunk discriminants, against covariance matrices written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlm_safeguard.policy.directions import auroc, fit_directions
from vlm_safeguard.policy.discriminant import (
    choose_discriminant,
    fit_discriminant,
    held_out_scores,
)


def states(n: int = 30, layers: int = 2, hidden: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, generator=generator)
    harmful, harmless = torch.randn(2, n, layers, hidden, generator=generator) @ mixing
    return harmful + torch.linspace(0.5, 2, hidden), harmless


@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("n", "hidden"), [(30, 12), (8, 40)])
def test_weights_solve_the_shrunk_covariance_written_out(
    n: int, hidden: int, shrinkage: float
) -> None:
    harmful, harmless = states(n, 2, hidden)
    fitted = fit_discriminant(harmful, harmless, shrinkage)
    for layer in range(2):
        high, low = harmful[:, layer].double().mean(0), harmless[:, layer].double().mean(0)
        rows = [*(harmful[:, layer].double() - high), *(harmless[:, layer].double() - low)]
        S = sum((torch.outer(x, x) for x in rows), torch.zeros(hidden, hidden).double()) / len(rows)
        covariance = (1 - shrinkage) * S + shrinkage * S.trace() / hidden * torch.eye(hidden)
        w = torch.linalg.solve(covariance, high - low)
        cosine = torch.nn.functional.cosine_similarity(w, fitted.weights[layer].double(), dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-6)


def test_the_classes_means_score_plus_and_minus_one() -> None:
    harmful, harmless = states()
    fitted = fit_discriminant(harmful, harmless, 0.2)
    ones = torch.ones(2)
    torch.testing.assert_close(fitted.scores(harmful).mean(0), ones, rtol=0, atol=1e-4)
    torch.testing.assert_close(fitted.scores(harmless).mean(0), -ones, rtol=0, atol=1e-4)
    for layer in range(2):
        mine = fitted.score(harmful[:, layer], layer)
        torch.testing.assert_close(mine, fitted.scores(harmful)[:, layer])


def test_it_looks_past_what_varies_most() -> None:
    """A planted difference in a quiet dimension, beside a loud one: the SSD follows the loud."""
    generator = torch.Generator().manual_seed(1)
    harmful, harmless = torch.randn(2, 60, 1, 20, generator=generator)
    harmful[..., 0] = harmful[..., 0] * 0.1 + 0.5
    harmless[..., 0] = harmless[..., 0] * 0.1 - 0.5
    for kind in (harmful, harmless):
        kind[..., 1] *= 6
    new_harmful, new_harmless = harmful[40:], harmless[40:]
    told = fit_discriminant(harmful[:40], harmless[:40], 0.1)
    directions = fit_directions(harmful[:40], harmless[:40], 1)
    assert float(auroc(told.scores(new_harmful), told.scores(new_harmless))[0]) > 0.99
    scores = (directions.harm_scores(x) for x in (new_harmful, new_harmless))
    assert float(auroc(*scores)[0]) < 0.8


def test_held_out_scores_leave_a_whole_fold_out() -> None:
    (harmful, harmless), (more, _) = states(), states(17, seed=5)
    harmless = torch.cat([harmless, more])  # the classes need not be as many
    fold_of = torch.arange(30) % 3, torch.arange(47) % 4
    shrinkages = (0.1, 0.7)
    positive, negative = held_out_scores(harmful, harmless, fold_of, shrinkages)
    for fold in range(4):
        out = [folds == fold for folds in fold_of]
        for index, shrinkage in enumerate(shrinkages):
            fitted = fit_discriminant(harmful[~out[0]], harmless[~out[1]], shrinkage)
            torch.testing.assert_close(positive[index, out[0]], fitted.scores(harmful[out[0]]))
            torch.testing.assert_close(negative[index, out[1]], fitted.scores(harmless[out[1]]))


def test_the_shrinkage_and_the_layers_are_those_that_tell_other_folds_best() -> None:
    """Against all choices tried by hand; one layer is noise and is left out."""
    harmful, harmless = states(40, 3, 30, seed=3)
    harmful[:, 1], harmless[:, 1] = torch.randn(
        2, 40, 30, generator=torch.Generator().manual_seed(9)
    )
    folds, shrinkages = torch.arange(40) % 4, (0.01, 0.3, 0.9)
    fold_of = folds, folds
    chosen = choose_discriminant(harmful, harmless, fold_of, shrinkages, 0.02)
    scores = held_out_scores(harmful, harmless, fold_of, shrinkages)
    tried = {}
    for index, shrinkage in enumerate(shrinkages):
        positive, negative = (side[index] for side in scores)
        each = auroc(positive, negative)
        layers = [layer for layer in range(3) if each[layer] >= each.max() - 0.02]
        means = [side[:, layers].mean(1) for side in (positive, negative)]
        tried[shrinkage] = (float(auroc(*(mean[:, None] for mean in means))), layers, means)
    best = max(tried, key=lambda shrinkage: tried[shrinkage][0])
    assert chosen.shrinkage == best
    _, layers, means = tried[best]
    assert chosen.layers == tuple(layers)
    assert all(map(torch.equal, (chosen.harmful, chosen.harmless), means))
    assert 1 not in chosen.layers
    whole = fit_discriminant(harmful, harmless, best)
    assert torch.equal(chosen.discriminant.weights, whole.weights)


@pytest.mark.parametrize(
    ("harmful", "harmless", "words"),
    [
        (torch.zeros(3, 2, 4), torch.zeros(3, 2, 5), "two classes"),
        (torch.zeros(1, 2, 4), torch.zeros(3, 2, 4), "at least two"),
        (torch.zeros(3, 2, 4), torch.full((3, 2, 4), torch.nan), "not finite"),
        (torch.zeros(3, 2, 4), torch.ones(3, 2, 4), "do not vary"),
    ],
)
def test_what_cannot_be_fitted(harmful: Tensor, harmless: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_discriminant(harmful, harmless, 0.5)
