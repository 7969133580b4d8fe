import pytest
import torch

from hf_pdprune.search.reduced_rank import Sums, best_ridge, reduced_rank, ridge_regression


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 12, generator=generator)
    weight = torch.randn(12, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    return features, features @ weight + 0.01 * torch.randn(200, 6, generator=generator), weight


def test_a_linear_map_of_low_rank_is_found(problem):
    features, targets, weight = problem
    sums = Sums.of(features[:120], targets[:120]) + Sums.of(features[120:], targets[120:])
    fitted = ridge_regression(sums, 1e-8)
    assert torch.allclose(fitted, torch.linalg.lstsq(features, targets).solution, atol=1e-3)
    down, up = reduced_rank(sums, fitted, rank=3)
    assert down.shape == (3, 12) and up.shape == (6, 3)
    assert torch.allclose((up @ down).T, weight, atol=0.02)
    residual = targets - features @ down.T @ up.T
    left = (residual**2).sum() / (targets**2).sum()
    assert sums.left_by((up @ down).T) == pytest.approx(float(left), abs=1e-4) and left < 0.01


def test_the_rank_that_is_kept_is_the_one_that_explains_most(problem):
    features, targets, _ = problem
    sums = Sums.of(features, targets)
    fitted = ridge_regression(sums, 1e-8)
    best = torch.linalg.svd(features @ fitted)
    down, up = reduced_rank(sums, fitted, rank=1)
    expected = 1 - float(best.S[0] ** 2 / (targets**2).sum())
    assert sums.left_by((up @ down).T) == pytest.approx(expected, abs=1e-4)


def test_noise_takes_a_larger_ridge():
    generator = torch.Generator().manual_seed(1)
    halves = [Sums.of(torch.randn(30, 20, generator=generator), torch.randn(30, 4, generator=generator)) for _ in "ab"]
    ridge, left = best_ridge(*halves, (1e-6, 0.1, 100.0))
    assert ridge == 100.0 and left == pytest.approx(1, abs=0.1)
