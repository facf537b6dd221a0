"""The safety steering direction against eigenvectors, double loops and planted answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_safeguard.policy.directions import (
    Directions,
    auroc,
    choose_layers,
    fit_directions,
    held_out_scores,
    legible_layers,
    random_basis,
)

PAIRS, LAYERS, HIDDEN, RANK = 13, 3, 12, 4


def states(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    harmful, harmless = torch.randn(2, PAIRS, LAYERS, HIDDEN, generator=generator)
    return harmful + torch.linspace(0.5, 2, HIDDEN), harmless


def eigen(harmful: Tensor, harmless: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Singular values and oriented right singular vectors, by the eigenvectors of AᵀA."""
    a = (harmful[:, layer] - harmless[:, layer]).double()
    values, vectors = torch.linalg.eigh(a.T @ a)
    rows = []
    for k in reversed(range(HIDDEN)):
        v = vectors[:, k]
        mean = sum(float(row @ v) for row in a) / len(a)
        rows.append(v if mean >= 0 else -v)
    return values.flip(0).clamp(min=0).sqrt(), torch.stack(rows)


def test_directions_equal_the_eigenvectors() -> None:
    harmful, harmless = states()
    fitted = fit_directions(harmful, harmless, RANK)
    assert fitted.vectors.shape == (LAYERS, RANK, HIDDEN)
    assert fitted.rank == RANK
    for layer in range(LAYERS):
        values, rows = eigen(harmful, harmless, layer)
        torch.testing.assert_close(fitted.spectrum[layer].double(), values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            fitted.vectors[layer].double(), rows[:RANK], rtol=1e-3, atol=1e-4
        )
        gram = fitted.vectors[layer] @ fitted.vectors[layer].T
        torch.testing.assert_close(gram, torch.eye(RANK), rtol=0, atol=1e-5)
        for k in range(HIDDEN):
            for mean, of in ((fitted.harmful_mean, harmful), (fitted.harmless_mean, harmless)):
                plain = sum(float(of[i, layer, k]) for i in range(PAIRS)) / PAIRS
                assert float(mean[layer, k]) == pytest.approx(plain, abs=1e-5)


def test_shares_of_the_energy_are_the_variance_along_each_eigenvector() -> None:
    harmful, harmless = states()
    shares = fit_directions(harmful, harmless, RANK).energy_shares
    assert shares.shape == (LAYERS, HIDDEN)
    for layer in range(LAYERS):
        difference = (harmful[:, layer] - harmless[:, layer]).double()
        whole = sum(float(entry) ** 2 for entry in difference.flatten())
        _, rows = eigen(harmful, harmless, layer)
        for k in range(HIDDEN):
            along = sum(float(row @ rows[k]) ** 2 for row in difference)
            assert float(shares[layer, k]) == pytest.approx(along / whole, abs=1e-5)


def test_a_planted_direction_is_found() -> None:
    planted = torch.zeros(HIDDEN)
    planted[3] = -1.0
    _, harmless = states(1)
    fitted = fit_directions(harmless + 5 * planted, harmless, 1)
    torch.testing.assert_close(fitted.vectors[:, 0], planted.expand(LAYERS, -1))
    assert (fitted.auroc > 0.9).all()


@pytest.mark.parametrize(
    "flip", [lambda v: -v, lambda v: v * (-1.0) ** torch.arange(v.shape[1])[:, None]]
)
def test_the_sign_does_not_depend_on_the_svd(
    monkeypatch: pytest.MonkeyPatch, flip: Callable[[Tensor], Tensor]
) -> None:
    harmful, harmless = states()
    before = fit_directions(harmful, harmless, RANK)
    svd = torch.linalg.svd

    def other(a: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, rows = svd(a, **options)
        return flip(u.mT).mT, s, flip(rows)

    monkeypatch.setattr(torch.linalg, "svd", other)
    after = fit_directions(harmful, harmless, RANK)
    assert torch.equal(before.vectors, after.vectors)
    assert torch.equal(before.auroc, after.auroc)


def test_the_order_of_pairs_does_not_matter_and_swapping_turns_the_sign() -> None:
    harmful, harmless = states()
    fitted = fit_directions(harmful, harmless, RANK)
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(3))
    permuted = fit_directions(harmful[order], harmless[order], RANK)
    torch.testing.assert_close(permuted.vectors, fitted.vectors, rtol=1e-3, atol=1e-4)
    swapped = fit_directions(harmless, harmful, RANK)
    torch.testing.assert_close(swapped.vectors, -fitted.vectors, rtol=1e-3, atol=1e-4)


def test_harm_score_is_centred_and_linear() -> None:
    harmful, harmless = states()
    fitted = fit_directions(harmful, harmless, RANK)
    for layer in range(LAYERS):
        high, low = fitted.harmful_mean[layer], fitted.harmless_mean[layer]
        points = torch.stack([high, low, (high + low) / 2, 2 * high - low])
        torch.testing.assert_close(
            fitted.harm_score(points, layer),
            torch.tensor([1.0, -1.0, 0.0, 3.0]),
            rtol=1e-4,
            atol=1e-4,
        )
        moved = fitted.harm_score(points + 7 * fitted.vectors[layer, 1], layer)
        torch.testing.assert_close(moved, fitted.harm_score(points, layer), rtol=1e-3, atol=1e-4)
    table = fitted.harm_scores(harmful)
    assert table.shape == (PAIRS, LAYERS)
    for layer in range(LAYERS):
        assert torch.equal(table[:, layer], fitted.harm_score(harmful[:, layer], layer))


def test_held_out_scores_leave_the_anchor_out() -> None:
    harmful, harmless = states()
    positive, negative = held_out_scores(harmful, harmless)
    for i in range(PAIRS):
        rest = [j for j in range(PAIRS) if j % 5 != i % 5]
        assert i not in rest
        for layer in range(LAYERS):
            v = eigen(harmful[rest], harmless[rest], layer)[1][0]
            high = float(harmful[rest, layer].double().mean(0) @ v)
            low = float(harmless[rest, layer].double().mean(0) @ v)
            for scores, of in ((positive, harmful), (negative, harmless)):
                expected = 2 * (float(of[i, layer].double() @ v) - low) / (high - low) - 1
                assert float(scores[i, layer]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("missing", [False, True])
def test_auroc_equals_a_double_loop(missing: bool) -> None:
    """Scores that are no numbers win nothing, and lose nothing to others."""
    generator = torch.Generator().manual_seed(0)
    positive = torch.randint(0, 6, (9, 4), generator=generator).float()  # with ties
    negative = torch.randint(0, 5, (7, 4), generator=generator).float()
    if missing:
        positive[2, 1] = negative[3, 2] = negative[4, 3] = positive[:, 3] = torch.nan
    for column, value in enumerate(auroc(positive, negative)):
        wins = 0.0
        for p in positive[:, column].tolist():
            for n in negative[:, column].tolist():
                wins += 1.0 if p > n else 0.5 if p == n else 0.0
        assert float(value) == pytest.approx(wins / (9 * 7), abs=1e-6)
    if not missing:
        torch.testing.assert_close(
            auroc(negative, positive), 1 - auroc(positive, negative), rtol=0, atol=1e-6
        )


def test_reported_auroc_is_held_out() -> None:
    harmful, harmless = torch.randn(
        2, PAIRS, LAYERS, 200, generator=torch.Generator().manual_seed(5)
    )
    fitted = fit_directions(harmful, harmless, 1)
    torch.testing.assert_close(fitted.auroc, auroc(*held_out_scores(harmful, harmless)))
    seen = auroc(fitted.harm_scores(harmful), fitted.harm_scores(harmless))
    assert (fitted.auroc < seen).all()  # noise looks better to what was fitted on it


def with_auroc(values: list[float]) -> Directions:
    empty = torch.empty(0)
    return Directions(empty, empty, empty, empty, torch.tensor(values))


@pytest.mark.parametrize(
    ("count", "first", "last"), [(1, 0, 0), (2, 1, 1), (6, 2, 4), (28, 8, 25), (30, 8, 27)]
)
def test_chosen_layers(count: int, first: int, last: int) -> None:
    assert choose_layers(count, 0.27, 0.9) == tuple(range(first, last + 1))


def test_legible_layers_are_the_ones_near_the_best() -> None:
    fitted = with_auroc([1.0, 0.5, 0.895, 0.9, 0.875, 0.91])
    assert legible_layers(fitted, (1, 2, 3, 4, 5), 0.02) == (2, 3, 5)
    assert legible_layers(fitted, (1,), 0.02) == (1,)


def test_random_basis_is_a_control_of_the_same_form() -> None:
    fitted = fit_directions(*states(), RANK)
    basis = random_basis(fitted, 7)
    assert basis.shape == fitted.vectors.shape
    for layer in range(LAYERS):
        torch.testing.assert_close(
            basis[layer] @ basis[layer].T, torch.eye(RANK), rtol=0, atol=1e-5
        )
        difference = fitted.harmful_mean[layer] - fitted.harmless_mean[layer]
        assert all(float(row @ difference) >= 0 for row in basis[layer])
    assert torch.equal(basis, random_basis(fitted, 7))
    assert not torch.allclose(basis, random_basis(fitted, 8))
    assert float((basis[:, 0] * fitted.vectors[:, 0]).sum(-1).abs().max()) < 0.95


def test_directions_move_as_one() -> None:
    fitted = fit_directions(*states(), RANK).to("cpu")
    assert torch.equal(fitted.vectors, fit_directions(*states(), RANK).vectors)
    moved = fitted.to("meta")
    assert all(tensor.device.type == "meta" for tensor in vars(moved).values())


def test_states_that_cannot_be_used_are_refused() -> None:
    harmful, harmless = states()
    with pytest.raises(ValueError, match="paired states"):
        fit_directions(harmful[1:], harmless, 1)
    with pytest.raises(ValueError, match="paired states"):
        fit_directions(harmful[0], harmless[0], 1)
    for rank in (0, HIDDEN + 1):
        with pytest.raises(ValueError, match=f"rank {rank}"):
            fit_directions(harmful, harmless, rank)
    for bad in (float("nan"), float("inf")):
        broken = harmless.clone()
        broken[2, 1, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            fit_directions(harmful, broken, 1)
