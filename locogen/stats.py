"""Intervals and comparisons for scores of pictures: arrays in, arrays out, numpy only.

Scores are (windows, prompts, seeds), in any unit; larger means "carries more of the concept" (the caller sets
the sign). Prompts and seeds are *crossed*: pictures that share either are alike, and a bootstrap over single
pictures is too sure of itself. So both are resampled apart: Owen, "The pigeonhole bootstrap", Ann. Appl.
Stat. 1(2), 2007, doi:10.1214/07-AOAS122. tests/test_stats.py simulates coverage and error rates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
FEW_PROMPTS = 6  # below this many, a result speaks "for these prompts" only
TINY = 1e-150  # in the place of a spread that is zero


@dataclass(frozen=True, eq=False)
class Interval:
    """Means and their intervals, one per leading index of the values, in the values' unit.

    `prompts`, `seeds`: "random" (resampled: the interval speaks for others like them) or "fixed" (for these
    only). Where both are fixed there is no interval: `low` and `high` are NaN.
    """

    estimate: Array
    low: Array
    high: Array
    prompts: str
    seeds: str


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Differences of means tested together, one entry per comparison, in the values' unit.

    The lower bounds `low` hold all together with probability 1 - alpha; `p_value` is adjusted for the family;
    low > 0 exactly where p_value <= alpha. `prompts`, `seeds`, NaN: as in `Interval`.
    """

    estimate: Array
    low: Array
    p_value: Array
    prompts: str
    seeds: str


@dataclass(frozen=True, eq=False)
class Lead:
    """How far a candidate window is ahead of its rivals, in the values' unit.

    `lead`: its mean minus that of the best `rival`; `low`: simultaneous lower bound of the lead; `p_value`:
    adjusted, of "some rival is as good"; `each`: the comparison with each of `rivals`.
    """

    lead: float
    low: float
    p_value: float
    rival: int
    rivals: tuple[int, ...]
    each: Comparisons


def crossed_bootstrap(
    values: ArrayLike, *, draws: int = 2000, level: float = 0.95, seed: int = 0, prompts: str | None = None
) -> Interval:
    """Mean over prompts and seeds with an interval, per leading index of `values` (..., prompts, seeds).

    Owen's draws alone are too narrow for few prompts or seeds, so they give the shape only: deviations are
    scaled to the variance var(prompt means)/P + var(seed means)/S, which like Owen's errs to the safe side
    when prompts and seeds interact, and divided by sqrt(chi2/df), df by Satterthwaite. Were the draws normal,
    this would be Student's t interval. A window's interval does not depend on the other windows.
    `prompts`: "random", "fixed" (only seeds resampled), None: random from 6 on. One seed counts as fixed.
    Raises ValueError for a wrong shape, non-finite values (names the place), one prompt to be resampled.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1")
    raw = np.asarray(values, dtype=np.float64)
    x = _checked(raw.reshape(-1, *raw.shape[-2:]) if raw.ndim > 1 and raw.size else raw, "values")
    factors = _factors(x, prompts)
    estimate = x.mean((1, 2))
    low = high = np.full_like(estimate, np.nan)
    if "random" in factors:
        variance, freedom = _variance(x, factors)
        drawn = _scaled(_deviations(x, draws, seed, factors), variance[:-1])  # (draws, windows)
        drawn /= np.stack([_student(df, draws, seed) for df in freedom[:-1]], axis=1)
        low, high = estimate + np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    shape = raw.shape[:-2]
    return Interval(estimate.reshape(shape), low.reshape(shape), high.reshape(shape), *factors)


def simultaneous_lead(
    values: ArrayLike,
    candidate: int,
    rivals: Iterable[int] | None = None,
    *,
    apart: int = 1,
    chosen_here: bool = True,
    alpha: float = 0.05,
    draws: int = 2000,
    seed: int = 0,
    prompts: str | None = None,
) -> Lead:
    """Compare one window with its rivals, paired and corrected; `values` is (windows, prompts, seeds).

    `rivals`: window indices; None: all at least `apart` away from the candidate (the number of layers in a
    window, so that none overlaps it). Error rate controlled: the family-wise one. Whatever the true means,
    the probability that *any* bound of the family lies above its true difference is at most `alpha`.
    `chosen_here`: the candidate was picked by looking at these values, so the family is every ordered pair of
    windows `apart`; False: picked on other data, so the family is its own rivals. Data on other seeds of the
    same prompts (`split_seeds`) are other data only for these prompts: there, say prompts="fixed".
    Raises ValueError as `crossed_bootstrap`, and for no rival, an unknown one, or the candidate among them.
    """
    x = _checked(values, "values")
    count = len(x)
    if rivals is None:
        rivals = [w for w in range(count) if w != candidate and abs(w - candidate) >= apart]
    against = tuple(dict.fromkeys(int(r) for r in rivals))
    if not against or not {candidate, *against} <= set(range(count)) or candidate in against:
        remedy = f"it needs at least one rival, another of the windows 0 to {count - 1} (apart={apart})"
        raise ValueError(f"candidate {candidate} cannot be compared with rivals {against}: {remedy}")
    pairs = [(candidate, r) for r in against]
    if chosen_here:
        others = [(i, j) for i in range(count) for j in range(count) if i != j and abs(i - j) >= apart]
        pairs = list(dict.fromkeys(pairs + others))
    every, own = _compare(x, pairs, alpha, draws, seed, prompts), slice(len(against))
    each = Comparisons(every.estimate[own], every.low[own], every.p_value[own], every.prompts, every.seeds)
    lead, low, p_value = (float(k) for k in (each.estimate.min(), each.low.min(), each.p_value.max()))
    return Lead(lead, low, p_value, against[int(each.estimate.argmin())], against, each)


def any_effect(
    values: ArrayLike,
    placebo: ArrayLike,
    *,
    alpha: float = 0.05,
    draws: int = 2000,
    seed: int = 0,
    prompts: str | None = None,
) -> Comparisons:
    """Is some window's effect larger than the placebo's? One paired comparison per window.

    `values` is (windows, prompts, seeds); `placebo` (prompts, seeds), or (K, prompts, seeds): the mean over K
    counts. Error rate controlled: the family-wise one. If no window differs from the placebo, the probability
    that any is declared larger (`p_value.min() <= alpha`) is at most `alpha`.
    Raises ValueError as `crossed_bootstrap`, and for a placebo with other prompts or seeds.
    """
    x, raw = _checked(values, "values"), np.asarray(placebo, dtype=np.float64)
    p = _checked(raw[None] if raw.ndim == 2 else raw, "placebo")
    if p.shape[1:] != x.shape[1:]:
        raise ValueError(f"placebo has shape {p.shape}, values {x.shape}: use the same prompts and seeds")
    both = np.concatenate([x, p.mean(0, keepdims=True)])
    return _compare(both, [(w, len(x)) for w in range(len(x))], alpha, draws, seed, prompts)


def split_seeds(seeds: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Deal seeds in turn into (choose, report): find the carrier on every third, judge it on the others.

    Deterministic; under four seeds are too few to split, and all of them serve for both. Both share the prompts,
    whose quirks the choice has seen: the report is fair for these prompts only. Raises ValueError for no or
    repeated seeds.
    """
    dealt = tuple(seeds)
    if not dealt or len(set(dealt)) < len(dealt):
        raise ValueError(f"seeds {dealt} cannot be split: give at least one, and none twice")
    if len(dealt) < 4:
        return dealt, dealt
    return dealt[1::3], tuple(seed for place, seed in enumerate(dealt) if place % 3 != 1)


def welch_z(a: ArrayLike, b: ArrayLike) -> Array:
    """Two-sample z along axis 0: (n, d), (m, d) -> (d,), unitless, positive where `a` is larger.

    (mean a - mean b) / sqrt(var a/n + var b/m), unbiased variances (Welch, Biometrika 34, 1947); 0 where a
    column varies in neither. Raises ValueError for under two rows, different columns, non-finite values.
    """
    return _welch(a, b)[0]


def welch_p(a: ArrayLike, b: ArrayLike) -> Array:
    """Two-sided p-value of each column's `welch_z`, (d,): Student's t with Welch's degrees of freedom.

    Satterthwaite's approximation, (u + v)² / (u²/(n - 1) + v²/(m - 1)) with u = var a/n, v = var b/m; the normal
    distribution is too sure of few rows. 1 where a column varies in neither. Raises ValueError as `welch_z`.
    """
    return student_p(*_welch(a, b))


def student_p(t: ArrayLike, freedom: ArrayLike) -> Array:
    """P(|T| > |t|) for Student's t, elementwise, to some ten digits for 1 to 1000 degrees of freedom.

    With t = sqrt(freedom) / tan(x), the tail is the integral of sin(x)**(freedom - 1) from 0 on.
    """
    t, freedom = np.broadcast_arrays(np.asarray(t, np.float64), np.asarray(freedom, np.float64))
    node, weight = _gauss()

    def tail(end: Array) -> Array:
        x = end[..., None] * node**2  # squared: a smooth integrand at 0 whatever the freedom
        return (np.sin(x) ** (freedom[..., None] - 1) * 2 * node * weight).sum(-1) * end

    return tail(np.arctan2(np.sqrt(freedom), np.abs(t))) / tail(np.full(t.shape, np.pi / 2))


@functools.cache
def _gauss() -> tuple[Array, Array]:
    """Nodes and weights of Gauss and Legendre's rule between 0 and 1."""
    node, weight = np.polynomial.legendre.leggauss(200)
    return (node + 1) / 2, weight / 2


def student_quantile(tail: float, freedom: float) -> float:
    """The t with P(T > t) = tail for Student's t, by bisection, as exact as `student_p`; 0 < `tail` < 0.5."""
    low, high = 0.0, 1.0
    while student_p(high, freedom) > 2 * tail:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > 2 * tail else (low, middle)
    return high


def false_discovery(p_values: ArrayLike) -> Array:
    """p-values adjusted for how many there are (Benjamini & Hochberg, J. R. Stat. Soc. B 57, 1995), (d,).

    Of all entries called at adjusted p <= q, at most the share q is expected to be false, for tests that are
    independent or depend positively.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)[::-1]
    scaled = p[order] * p.size / np.arange(p.size, 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled), 1)
    return adjusted


def _welch(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Welch's z and degrees of freedom of each column, (d,) each; 0 and 1 where it varies in neither."""
    x, y = _checked(a, "a", ("row", "column")), _checked(b, "b", ("row", "column"))
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"a {x.shape} and b {y.shape} need the same columns and at least two rows each")
    u, v = ((k - k[0]).var(0, ddof=1) / len(k) for k in (x, y))
    spread = np.sqrt(u + v)
    gap = x.mean(0) - y.mean(0)
    z = np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)
    share = np.divide(u, u + v, out=np.ones_like(gap), where=spread > 0)
    return z, 1 / (share**2 / (len(x) - 1) + (1 - share) ** 2 / (len(y) - 1))


def wilson(hits: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, `hits` of `count` (J. Am. Stat. Assoc. 22, 1927): honest at 0 and at all.

    Trials must be independent: for several pictures of one prompt give prompts as `count`, and `hits` in parts.
    Raises ValueError for a count under 1, hits outside it, or a level that is no probability.
    """
    if not 0 <= hits <= count or count < 1 or not 0 < level < 1:
        raise ValueError(f"{hits} hits of {count} at level {level} are no share: give 0 <= hits <= count, count >= 1")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = (hits + z2 / 2) / (count + z2)
    half = math.sqrt(z2 * (hits * (count - hits) / count + z2 / 4)) / (count + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _compare(
    x: Array, pairs: Sequence[tuple[int, int]], alpha: float, draws: int, seed: int, prompts: str | None
) -> Comparisons:
    """One-sided single-step max-t (Westfall & Young 1993) over pairs (i, j) of rows of `x`: is i above j?

    All rows share the resampled prompts and seeds. One pair's variance from few seeds is too rough to divide
    by: each t is moderated (Tusher et al. 2001, Smyth 2004), half the pair's own variance, half the family's
    mean. Maxima are divided by sqrt(chi2/df) with the df of the family's mean variances.
    """
    rank = int(alpha * (draws + 1) + 1e-9)  # the rank-th largest maximum is the critical value
    if not 1 <= rank <= draws:
        raise ValueError(f"alpha={alpha} is not between 0 and 1, or draws={draws} are fewer than 1 / alpha")
    factors = _factors(x, prompts)
    i, j = np.array(pairs).T
    gap = x[i].mean((1, 2)) - x[j].mean((1, 2))  # (pairs,)
    if "random" not in factors:
        return Comparisons(gap, np.full_like(gap, np.nan), np.full_like(gap, np.nan), *factors)
    variance, freedom = _variance(x[i] - x[j], factors)
    scale = np.maximum(np.sqrt((variance[:-1] + variance[-1]) / 2), TINY)
    drawn = _deviations(x, draws, seed, factors)  # (draws, rows)
    drawn = _scaled(drawn[:, i] - drawn[:, j], variance[:-1]) / scale  # (draws, pairs)
    peaks = np.sort(drawn.max(1) / _student(freedom[-1], draws, seed))
    smaller = np.searchsorted(peaks, gap / scale)  # how many maxima lie under each t
    return Comparisons(gap, gap - peaks[-rank] * scale, (1 + draws - smaller) / (1 + draws), *factors)


def _factors(x: Array, prompts: str | None) -> tuple[str, str]:
    """Whether (prompts, seeds) are "random" or "fixed"."""
    chosen = prompts or ("random" if x.shape[1] >= FEW_PROMPTS else "fixed")
    if chosen not in ("random", "fixed"):
        raise ValueError(f"prompts={prompts!r} is not known: use 'random', 'fixed' or None")
    if chosen == "random" and x.shape[1] < 2:
        raise ValueError("one prompt cannot be resampled: give more prompts, or prompts='fixed'")
    return chosen, "random" if x.shape[2] > 1 else "fixed"


def _deviations(x: Array, draws: int, seed: int, factors: tuple[str, str]) -> Array:
    """Resampled minus actual means, (draws, windows); every window sees the same prompts and seeds."""
    rng = np.random.default_rng(seed)
    u, v = (
        rng.multinomial(n, np.full(n, 1 / n), draws) / n if how == "random" else np.full((draws, n), 1 / n)
        for n, how in zip(x.shape[1:], factors, strict=True)
    )  # (draws, prompts), (draws, seeds)
    by_prompt = np.tensordot(u, x - x.mean((1, 2), keepdims=True), axes=(1, 1))  # (draws, windows, seeds)
    return np.einsum("dws,ds->dw", by_prompt, v)


def _variance(x: Array, factors: tuple[str, str]) -> tuple[Array, Array]:
    """Variances of means, degrees of freedom (Satterthwaite 1946); last, of their average; (windows + 1,)."""
    x = x - x[:, :1, :1]  # a constant window is exactly zero from here on
    sides = zip((x.mean(2), x.mean(1)), factors, strict=True)
    parts = [m.var(1, ddof=1) / m.shape[1] if how == "random" else np.zeros(len(m)) for m, how in sides]
    a, b = (np.append(part, part.mean()) for part in parts)  # from prompts, from seeds
    share = a / np.maximum(a + b, TINY)
    count, seeds = (max(n - 1, 1) for n in x.shape[1:])
    return a + b, 1 / (share**2 / count + (1 - share) ** 2 / seeds)


def _scaled(drawn: Array, variance: Array) -> Array:
    """Deviations (draws, k), stretched to have mean square `variance` (k,)."""
    return drawn * (np.sqrt(variance) / np.maximum(np.sqrt(np.square(drawn).mean(0)), TINY))


def _student(freedom: float, draws: int, seed: int) -> Array:
    """What normal draws are divided by to become Student's: sqrt(chi2 / freedom), (draws,)."""
    return np.sqrt(np.random.default_rng([seed, 1]).standard_gamma(freedom / 2, draws) * 2 / freedom)


def _checked(values: ArrayLike, name: str, axes: tuple[str, ...] = ("window", "prompt", "seed")) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != len(axes) or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}, expected a non-empty ({'s, '.join(axes)}s)")
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        place = ", ".join(f"{axis} {k}" for axis, k in zip(axes, bad[0], strict=True))
        raise ValueError(f"{name} is {x[tuple(bad[0])]} at {place} ({len(bad)} in all): score it again")
    return x
