import pytest
import torch

from hf_pdprune.search.least_squares import LeastSquares


def sums_of(features, targets, batch_size=3):
    problem = LeastSquares()
    for a, r in zip(features.split(batch_size), targets.split(batch_size), strict=True):
        problem.add(a, r)
    return problem


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def features(generator):
    return torch.randn(10, 40, 12, generator=generator)


def test_sums_do_not_depend_on_how_rows_come(features, generator):
    targets = torch.randn(10, 40, 4, generator=generator)
    sums = sums_of(features, targets).totals()
    a, r = features.flatten(0, 1), targets.flatten(0, 1)
    torch.testing.assert_close(sums.gram, a.T @ a, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sums.cross, a.T @ r, atol=1e-3, rtol=1e-4)
    assert sums_of(features, targets, 1).ridge() == pytest.approx(sums_of(features, targets, 10).ridge())


def test_the_ridge_grows_with_noise(features, generator):
    targets = features @ torch.randn(12, 4, generator=generator)
    noise = 100 * torch.randn(targets.shape, generator=generator)
    assert sums_of(features, targets + noise).ridge() > sums_of(features, targets).ridge()


def test_the_ridge_depends_on_what_it_pulls_to(features, generator):
    prior = torch.randn(12, 4, generator=generator)
    targets = features @ prior + 10 * torch.randn(10, 40, 4, generator=generator)
    problem = sums_of(features, targets)
    assert problem.ridge(prior) > problem.ridge(10 * prior)


def test_a_single_row_gets_a_ridge_too(features):
    problem = sums_of(features[:1], features[:1, :, :4])
    assert problem.ridge() == 0.3


def test_reduced_rank_finds_a_map_of_that_rank(features, generator):
    low = torch.randn(12, 2, generator=generator) @ torch.randn(2, 4, generator=generator)
    down, up = sums_of(features, features @ low).reduced_rank(2)
    assert down.shape == (2, 12) and up.shape == (4, 2)
    torch.testing.assert_close((up @ down).T, low, atol=0.1, rtol=0.1)


def test_best_features_are_those_that_matter(features, generator):
    truth = torch.zeros(12, 4)
    truth[[1, 5, 8]] = torch.randn(3, 4, generator=generator)
    prior = torch.zeros(12, 4)
    chosen, columns = sums_of(features, features @ truth).best_features(prior, 3)
    assert chosen.tolist() == [1, 5, 8]
    torch.testing.assert_close(columns, truth[chosen], atol=0.1, rtol=0.1)


def test_where_nothing_is_missing_the_prior_stays(features, generator):
    prior = torch.randn(12, 4, generator=generator)
    chosen, columns = sums_of(features, features @ prior).best_features(prior, 12)
    torch.testing.assert_close(columns, prior, atol=1e-4, rtol=1e-4)


def test_a_feature_left_out_is_made_up_for_by_its_twin(features):
    twice = torch.cat([features, features[..., :1]], dim=-1)
    prior = torch.cat([torch.eye(12), torch.eye(12)[:1]])
    chosen, columns = sums_of(twice, twice @ prior).best_features(prior, 12)
    assert sorted(index % 12 for index in chosen.tolist()) == list(range(12))
    torch.testing.assert_close(
        columns[(chosen % 12).argsort()], torch.diag(torch.tensor([2.0] + 11 * [1.0])), atol=0.2, rtol=0.2
    )


def test_squared_error_is_that_of_all_rows(features, generator):
    targets = torch.randn(10, 40, 4, generator=generator)
    weight = torch.randn(12, 4, generator=generator)
    expected = (targets - features @ weight).pow(2).sum()
    assert sums_of(features, targets).squared_error(weight) == pytest.approx(float(expected), rel=1e-4)


def test_rows_can_be_restricted_to_some_features(features, generator):
    targets, chosen = torch.randn(10, 40, 4, generator=generator), torch.tensor([1, 4, 7])
    fewer, expected = sums_of(features, targets).restricted(chosen), sums_of(features[..., chosen], targets)
    assert fewer.rows == expected.rows == 10
    for part in (False, True):
        torch.testing.assert_close(fewer.sums[part].gram, expected.sums[part].gram)
        torch.testing.assert_close(fewer.sums[part].cross, expected.sums[part].cross)
