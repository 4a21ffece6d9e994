"""How far two rankings of the same layers agree: arrays in, numbers out, numpy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from locogen import stats

Array = NDArray[np.float64]


class Correlation(NamedTuple):
    """Spearman's rank correlation of two profiles of means, with its interval."""

    estimate: float
    low: float
    high: float


def rank_correlation(
    one: ArrayLike, two: ArrayLike, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Spearman's correlation over layers of two profiles, each the mean of (layers, prompts, seeds).

    Prompts and seeds are resampled apart, as in `stats.crossed_bootstrap`, the same ones for both profiles where both
    have as many. Noise alone makes rankings less alike, so what resampling takes away is given back: the interval
    reaches over both the percentile and the reversed one (Davison & Hinkley 1997, section 5.2), on Fisher's scale. NaN
    where a profile is flat; no interval for one seed and fewer than six prompts. Raises ValueError for other numbers of
    layers, or under three.
    """
    x, y = (np.asarray(values, np.float64) for values in (one, two))
    if x.ndim != 3 or y.ndim != 3 or len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"profiles have shapes {x.shape} and {y.shape}: give (layers, prompts, seeds) of three or more"
        )
    estimate = float(_spearman(x.mean((1, 2))[None], y.mean((1, 2))[None])[0])
    fixed = all("random" not in stats._factors(values, None) for values in (x, y))
    if not np.isfinite(estimate) or fixed:
        return Correlation(estimate, np.nan, np.nan)
    again = _spearman(*(_resampled(values, draws, seed) for values in (x, y)))
    again = again[np.isfinite(again)]
    ends = _fisher(np.quantile(again, [(1 - level) / 2, (1 + level) / 2]))
    both = np.tanh([*ends, *(2 * _fisher(estimate) - ends)])
    return Correlation(estimate, float(both.min()), float(both.max()))


def _resampled(values: Array, draws: int, seed: int) -> Array:
    """Profiles of resampled prompts and seeds, (draws, layers), as widely spread as `stats.crossed_bootstrap` has them.

    Few prompts, or one seed, are fixed.
    """
    factors = stats._factors(values, None)
    if "random" not in factors:
        return np.repeat(values.mean((1, 2))[None], draws, 0)
    variance, freedom = stats._variance(values, factors)
    drawn = stats._scaled(stats._deviations(values, draws, seed, factors), variance[:-1])
    return values.mean((1, 2)) + drawn / stats._student(freedom[-1], draws, seed)[:, None]


def _fisher(correlation: ArrayLike) -> Array:
    return np.arctanh(np.clip(correlation, -0.999, 0.999))


def _spearman(x: Array, y: Array) -> Array:
    """Pearson's correlation of the ranks, row by row, (rows, layers) -> (rows,); equal values share their mean rank."""
    a, b = (_ranks(values) - (values.shape[1] + 1) / 2 for values in (x, y))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def _ranks(values: Array) -> Array:
    """Mean ranks from 1 up, row by row."""
    less = (values[:, None, :] < values[:, :, None]).sum(2)
    same = (values[:, None, :] == values[:, :, None]).sum(2)
    return less + (same + 1) / 2
