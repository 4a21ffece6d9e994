"""Rank correlations: against a definition, at the ends, and how often the interval holds the truth."""

import numpy as np
import pytest

from locogen.stats import _spearman, rank_correlation


def crossed(means, noise, rng, prompts=2, seeds=4):
    """(layers, prompts, seeds): the means, noise of each picture, and noise that the prompts of a seed share."""
    count = len(means)
    shared = rng.normal(size=(count, 1, seeds))
    return means[:, None, None] + noise * (rng.normal(size=(count, prompts, seeds)) + shared)


def test_it_is_pearsons_correlation_of_the_ranks():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 9)).astype(float)  # with ties
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(v) == k)) for k in v]) for v in (x, y)]
    expected = np.corrcoef(*ranks)[0, 1]
    assert rank_correlation(x[:, None, None], y[:, None, None]).estimate == pytest.approx(expected)


def test_it_is_scipys_with_ties():
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(2).integers(0, 4, (2, 5, 9)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(_spearman(x, y), expected, rtol=1e-12)


def test_order_alone_matters_and_the_ends_are_reached():
    x = np.linspace(0, 1, 8)[:, None, None] + np.zeros((8, 2, 3))
    for other, expected in ((np.exp(5 * x), 1), (-(x**3), -1)):
        found = rank_correlation(x, other)
        assert found.estimate == pytest.approx(expected)
        assert found.low <= found.estimate + 0.002 and found.high >= found.estimate - 0.002
    assert np.isnan(rank_correlation(x, np.zeros_like(x)).estimate)
    assert np.isnan(rank_correlation(x[:, :, :1], x[:, :, :1]).low), (
        "one seed, two prompts: nothing to resample"
    )
    for wrong in (x[:3], x[0], x[:2]):
        with pytest.raises(ValueError, match="three or more"):
            rank_correlation(x if len(wrong) != 2 else wrong, wrong)


@pytest.mark.parametrize("truth", [0.0, 0.9])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_the_interval_holds_the_truth(truth, noise):
    """95 % is asked, at least 88 % is required: with 80 repetitions, two standard errors are 5 points."""
    rng, hits, widths = np.random.default_rng(1), 0, []
    for _ in range(80):
        a = rng.normal(size=16)
        b = truth * a + np.sqrt(1 - truth**2) * rng.normal(size=16)
        found = rank_correlation(*(crossed(means, noise, rng) for means in (a, b)), draws=200)
        hits += found.low <= _spearman(a[None], b[None])[0] <= found.high
        widths.append(found.high - found.low)
    assert hits >= 0.88 * 80
    assert np.mean(widths) < 1.2, "the twin: an interval of everything would hold it too"
