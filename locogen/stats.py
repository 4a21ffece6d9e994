"""Intervals, comparisons and rank correlations for scores of pictures: arrays in, arrays out.

Scores are (windows, prompts, seeds), in any unit; larger means "carries more of the concept" (the
caller sets the sign). Prompts and seeds are *crossed*: pictures that share either are alike, and a
bootstrap over single pictures gives intervals that are too narrow. So both are resampled
separately: Owen, "The pigeonhole bootstrap", Ann. Appl. Stat. 1(2), 2007, doi:10.1214/07-AOAS122.
tests/test_stats.py simulates coverage and error rates.

Textbook tests come from scipy; only the crossed bootstrap and the max-t comparisons are our own.
"""

# scipy is imported inside the functions: it takes half a second, and most tables do not need it.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
ALPHA = 0.05  # the error rate of all tests: of a whole family of them where several are made
FEW_PROMPTS = 6  # with fewer prompts, a result speaks "for these prompts" only
TINY = 1e-150  # replaces a spread of zero, so that nothing is divided by zero


@dataclass(frozen=True, eq=False)
class Interval:
    """Means and their intervals, one per leading index of the values, in the values' unit.

    `prompts`, `seeds`: "random" (resampled: the interval speaks for others like them) or "fixed"
    (for these only). Where both are fixed there is no interval: `low` and `high` are NaN.
    """

    estimate: Array
    low: Array
    high: Array
    prompts: str
    seeds: str


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Differences of means tested together, one entry per comparison, in the values' unit.

    The lower bounds `low` hold all together with probability 1 - alpha; `p_value` is adjusted for
    the family; low > 0 exactly where p_value <= alpha. `prompts`, `seeds`, NaN: as in `Interval`.
    """

    estimate: Array
    low: Array
    p_value: Array
    prompts: str
    seeds: str


@dataclass(frozen=True, eq=False)
class Lead:
    """How far a candidate window is ahead of its rivals, in the values' unit.

    `lead`: its mean minus that of the best `rival`; `low`: simultaneous lower bound of the lead;
    `p_value`: adjusted, of "some rival is as good"; `each`: the comparison with each of `rivals`.
    """

    lead: float
    low: float
    p_value: float
    rival: int
    rivals: tuple[int, ...]
    each: Comparisons


class Shares(NamedTuple):
    """Shares of a whole and their intervals, (windows,) each; NaN where no share can be given."""

    estimate: Array
    low: Array
    high: Array


def crossed_bootstrap(
    values: ArrayLike,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    prompts: str | None = None,
    yes_no: bool | None = None,
) -> Interval:
    """Mean over prompts and seeds with an interval, for each leading index of `values`.

    Yes/no scores may agree by luck, and an interval without width is then wrong. For them no
    interval is narrower than what as many independent trials as there are seeds (or prompts, where
    these are resampled and fewer) could tell of a share. Continuous scores have no such floor: of
    prompts on which an effect is missing, but that are not among these, they say nothing
    (`showing_prompts` says how many there may be).

    Args:
        values: Scores, (..., prompts, seeds), in any unit.
        draws: Number of bootstrap resamples.
        level: Coverage of the interval.
        seed: Seed of the resampling; the same seed gives the same interval.
        prompts: "random" (resample prompts), "fixed" (only seeds are resampled), or None: random
            from six prompts on. A single seed counts as fixed.
        yes_no: Whether scores are 0 or 1, or differences of such scores. None: yes where all are
            -1, 0 or 1, and not all 0.

    Returns:
        Estimates and bounds of shape (...). The interval of a window does not depend on other
        windows, but that `yes_no` is read off all of them.

    Raises:
        ValueError: For a wrong shape, values that are not finite (with their place), or one prompt
            that would have to be resampled.

    Example:
        >>> interval = crossed_bootstrap([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
        >>> print(f"{float(interval.estimate):.2f}")
        0.25
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1")
    raw = np.asarray(values, dtype=np.float64)
    stacked = raw
    if raw.ndim > 1 and raw.size:
        stacked = raw.reshape(-1, *raw.shape[-2:])  # (windows, prompts, seeds)
    x = _checked(stacked, "values")
    factors = _factors(x, prompts)

    estimate = x.mean((1, 2))  # (windows,)
    low = high = np.full_like(estimate, np.nan)
    if "random" in factors:
        # Owen's draws alone are too narrow for few prompts or seeds, so they give the shape only.
        # Their width comes from var(prompt means)/P + var(seed means)/S, which like Owen's is on
        # the safe side when prompts and seeds interact. Dividing by sqrt(chi2/df), with df by
        # Satterthwaite, makes it Student's t interval if the draws were normal.
        variance, freedom = _variance(x, factors)
        deviations = _deviations(x, draws, seed, factors)  # (draws, windows)
        scaled = _scaled(deviations, variance[:-1])
        scaled /= np.stack([_student(df, draws, seed) for df in freedom[:-1]], axis=1)
        tails = [(1 - level) / 2, (1 + level) / 2]
        low, high = estimate + np.quantile(scaled, tails, axis=0)
        if is_yes_no(x) if yes_no is None else yes_no:
            floor_low, floor_high = _share_floor(x, factors, level)
            low = np.minimum(low, floor_low)
            high = np.maximum(high, floor_high)
    shape = raw.shape[:-2]
    return Interval(estimate.reshape(shape), low.reshape(shape), high.reshape(shape), *factors)


def is_yes_no(values: ArrayLike) -> bool:
    """Whether values look like yes/no scores or their differences: -1, 0 or 1, and not all 0."""
    x = np.asarray(values, np.float64)
    return bool(np.isin(x, (-1.0, 0.0, 1.0)).all() and x.any())


def _share_floor(x: Array, factors: tuple[str, str], level: float) -> tuple[Array, Array]:
    """Bounds of the mean of yes/no scores by the number of units alone, (windows,) each.

    Gains (1) and losses (-1) are shares of the trials, each with Clopper and Pearson's bounds.
    """
    units = min(count for count, how in zip(x.shape[1:], factors, strict=True) if how == "random")
    gains = np.maximum(x, 0).mean((1, 2))  # (windows,)
    losses = np.maximum(-x, 0).mean((1, 2))
    least_gained, most_gained = _clopper_pearson(gains * units, units, level)
    least_lost, most_lost = _clopper_pearson(losses * units, units, level)

    # What was not seen at all counts only where nothing was: a score of 0 or 1 cannot be lost.
    nothing = (gains == 0) & (losses == 0)
    more_lost = np.where((losses > 0) | nothing, most_lost - losses, 0)
    more_gained = np.where((gains > 0) | nothing, most_gained - gains, 0)
    mean = gains - losses
    low = mean - np.hypot(gains - least_gained, more_lost)
    high = mean + np.hypot(losses - least_lost, more_gained)
    return low, high


def showing_prompts(
    effects: ArrayLike, *, part: float = 0.5, level: float = 0.95
) -> tuple[Array, Array, Array]:
    """On how many prompts each window's effect shows, and for what share of prompts it may show.

    An effect that is missing on one prompt in eight is seen on all of six prompts as often as not:
    the interval of its mean, which knows only these six, is then too narrow. The count tells what
    may be missing.

    Args:
        effects: Effects, (windows, prompts, seeds).
        part: An effect shows on a prompt if it is at least this part of the median prompt's.
        level: Coverage of the interval.

    Returns:
        For each window: the count of prompts, and the bounds of the share of prompts like these
        (Clopper and Pearson). Of a window without a positive median effect: 0 and NaN.

    Raises:
        ValueError: As `crossed_bootstrap`.

    Example:
        >>> count, low, high = showing_prompts([[[0.4], [0.5], [0.4], [0.5], [0.4], [0.6]]])
        >>> print(f"{count[0]:.0f} of 6 prompts, {low[0]:.0%} to {high[0]:.0%} of all")
        6 of 6 prompts, 54% to 100% of all
    """
    x = _checked(effects, "effects")
    means = x.mean(2)  # (windows, prompts)
    median = np.median(means, axis=1, keepdims=True)  # (windows, 1)
    positive = median[:, 0] > 0
    count = np.where(positive, (means >= part * median).sum(1), 0)
    low, high = _clopper_pearson(count, x.shape[1], level)
    return count, np.where(positive, low, np.nan), np.where(positive, high, np.nan)


def simultaneous_lead(
    values: ArrayLike,
    candidate: int,
    rivals: Iterable[int] | None = None,
    *,
    apart: int = 1,
    chosen_here: bool = True,
    alpha: float = ALPHA,
    draws: int = 2000,
    seed: int = 0,
    prompts: str | None = None,
) -> Lead:
    """Compare one window with its rivals, paired and corrected for the number of comparisons.

    The family-wise error rate is controlled: whatever the true means, the probability that *any*
    lower bound of the family lies above its true difference is at most `alpha`.

    Args:
        values: Scores, (windows, prompts, seeds).
        candidate: Index of the window.
        rivals: Indices of the windows to compare it with; None: all at least `apart` away.
        apart: Distance from which two windows do not overlap: the number of layers in a window.
        chosen_here: Whether the candidate was picked by looking at these values. Then the family is
            every ordered pair of windows `apart`; otherwise it is the candidate's own rivals. Other
            seeds of the same prompts (`split_seeds`) are other data only for these prompts: for
            them pass prompts="fixed".
        alpha: Family-wise error rate.
        draws: Number of bootstrap resamples.
        seed: Seed of the resampling.
        prompts: As in `crossed_bootstrap`.

    Returns:
        The lead over the best rival, with a simultaneous lower bound and an adjusted p-value.

    Raises:
        ValueError: As `crossed_bootstrap`, and for no rival, an unknown one, or the candidate
            itself.
    """
    x = _checked(values, "values")
    opponents = _opponents(len(x), candidate, rivals, apart)
    pairs = [(candidate, opponent) for opponent in opponents]
    if chosen_here:
        pairs = list(dict.fromkeys(pairs + _pairs_apart(len(x), apart)))
    family = _compare(x, pairs, alpha, draws, seed, prompts)

    count = len(opponents)  # the candidate's comparisons come first in the family
    each = Comparisons(
        family.estimate[:count],
        family.low[:count],
        family.p_value[:count],
        family.prompts,
        family.seeds,
    )
    return Lead(
        lead=float(each.estimate.min()),
        low=float(each.low.min()),
        p_value=float(each.p_value.max()),
        rival=opponents[int(each.estimate.argmin())],
        rivals=opponents,
        each=each,
    )


def _opponents(
    count: int, candidate: int, rivals: Iterable[int] | None, apart: int
) -> tuple[int, ...]:
    """The rivals of a candidate, each once."""
    if rivals is None:
        rivals = [other for second, other in _pairs_apart(count, apart) if second == candidate]
    opponents = tuple(dict.fromkeys(int(rival) for rival in rivals))
    known_windows = {candidate, *opponents} <= set(range(count))
    if not opponents or not known_windows or candidate in opponents:
        raise ValueError(
            f"candidate {candidate} cannot be compared with rivals {opponents}: it needs at least "
            f"one rival, another of the windows 0 to {count - 1} (apart={apart})"
        )
    return opponents


def _pairs_apart(count: int, apart: int) -> list[tuple[int, int]]:
    """All ordered pairs of different windows that do not overlap."""
    indices = range(count)
    return [(i, j) for i in indices for j in indices if i != j and abs(i - j) >= apart]


def any_effect(
    values: ArrayLike,
    placebo: ArrayLike,
    *,
    alpha: float = ALPHA,
    draws: int = 2000,
    seed: int = 0,
    prompts: str | None = None,
) -> Comparisons:
    """Test each window's effect against the placebo's: one paired comparison for each window.

    The family-wise error rate is controlled: if no window differs from the placebo, the probability
    that any is declared larger (`p_value.min() <= alpha`) is at most `alpha`.

    Args:
        values: Scores, (windows, prompts, seeds).
        placebo: Scores of the same prompts and seeds, (prompts, seeds), or (K, prompts, seeds), of
            which the mean over K counts.
        alpha: Family-wise error rate.
        draws: Number of bootstrap resamples.
        seed: Seed of the resampling.
        prompts: As in `crossed_bootstrap`.

    Returns:
        Differences, lower bounds and adjusted p-values, one for each window.

    Raises:
        ValueError: As `crossed_bootstrap`, and for a placebo with other prompts or seeds.
    """
    x = _checked(values, "values")
    raw = np.asarray(placebo, dtype=np.float64)
    if raw.ndim == 2:
        raw = raw[None]
    placebos = _checked(raw, "placebo")  # (K, prompts, seeds)
    if placebos.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"placebo has shape {placebos.shape}, values {x.shape}: use the same prompts and seeds"
        )
    rows = np.concatenate([x, placebos.mean(0, keepdims=True)])  # (windows + 1, prompts, seeds)
    pairs = [(window, len(x)) for window in range(len(x))]
    return _compare(rows, pairs, alpha, draws, seed, prompts)


def simultaneous_intervals(
    values: ArrayLike,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    prompts: str | None = None,
) -> Interval:
    """Mean of each window with bounds that hold for all windows together.

    So they hold for a window that was chosen by looking at these very values, as the one with the
    largest mean: all seeds serve for the choice and for the estimate. The interval of
    `crossed_bootstrap` holds for a window named beforehand.

    Args:
        values: Scores, (windows, prompts, seeds).
        level: Probability that all intervals cover at once.
        draws: Number of bootstrap resamples.
        seed: Seed of the resampling.
        prompts: As in `crossed_bootstrap`.

    Returns:
        Means and bounds, (windows,); bounds are NaN where there is nothing to resample.

    Raises:
        ValueError: As `crossed_bootstrap`.

    Example:
        >>> values = [[[0.1, 0.2, 0.3]], [[0.3, 0.2, 0.4]]]
        >>> together, one = simultaneous_intervals(values), crossed_bootstrap(values)
        >>> print(bool((together.low < one.low).all()))
        True
    """
    x = _checked(values, "values")
    count = len(x)
    rows = np.concatenate([x, np.zeros_like(x[:1])])  # (windows + 1, prompts, seeds)
    above = [(window, count) for window in range(count)]  # is the window above zero,
    below = [(count, window) for window in range(count)]  # or zero above the window?
    family = _compare(rows, above + below, 1 - level, draws, seed, prompts)
    low = family.low[:count]
    high = -family.low[count:]
    return Interval(family.estimate[:count], low, high, family.prompts, family.seeds)


def share_interval(
    effects: ArrayLike,
    ceiling: ArrayLike,
    *,
    level: float = 0.95,
    prompts: str | None = None,
) -> Shares:
    """What share of the ceiling's effect each window has: a ratio of two means, with its interval.

    Fieller's theorem (J. R. Stat. Soc. B 16, 1954): the interval holds every share r at which the
    mean of `effects - r * ceiling` cannot be told from zero. The noise of the ceiling counts, and
    the luck with prompts and seeds that both have in common cancels.

    Args:
        effects: Effects of the windows, (windows, prompts, seeds).
        ceiling: Effects of the whole on the same prompts and seeds, (1, prompts, seeds).
        level: Coverage of each window's interval. For a window that was chosen by looking at these
            effects, give 1 - (1 - level) / windows (Bonferroni).
        prompts: As in `crossed_bootstrap`.

    Returns:
        Shares and bounds, one for each window. All are NaN where the ceiling's own interval is not
        above zero, since a share of nothing means nothing; bounds also where there is nothing to
        resample.

    Raises:
        ValueError: As `crossed_bootstrap`, and for a ceiling of another shape.

    Example:
        >>> share, low, high = share_interval([[[0.2, 0.3, 0.2]]], [[[0.4, 0.6, 0.5]]])
        >>> print(f"{share[0]:.0%}, {low[0]:.0%} to {high[0]:.0%}")
        47%, 29% to 62%
    """
    x = _checked(effects, "effects")
    whole = _checked(ceiling, "ceiling")
    if whole.shape != (1, *x.shape[1:]):
        raise ValueError(
            f"ceiling has shape {whole.shape}, effects {x.shape}: "
            "give (1, prompts, seeds) of the same prompts and seeds"
        )
    factors = _factors(x, prompts)
    whole_mean = float(whole.mean())
    unknown = np.full(len(x), np.nan)
    if "random" not in factors:
        share = x.mean((1, 2)) / whole_mean if whole_mean > 0 else unknown
        return Shares(share, unknown.copy(), unknown.copy())

    of_whole = crossed_bootstrap(whole, level=level, prompts=prompts)
    if not of_whole.low[0] > 0:
        return Shares(unknown, unknown.copy(), unknown.copy())
    share = x.mean((1, 2)) / whole_mean
    low, high = _fieller(x, whole, share, factors, (1 - level) / 2)
    return Shares(np.where(np.isnan(low), np.nan, share), low, high)


def _fieller(
    x: Array, whole: Array, share: Array, factors: tuple[str, str], tail: float
) -> tuple[Array, Array]:
    """The ends of Fieller's interval of mean x / mean whole, (windows,) each; NaN: unbounded.

    The variance of mean(x - r * whole) is quadratic in r, hence so is the condition that r lies
    within the interval: (mean x - r * mean whole)^2 <= t^2 * variance(r).
    """
    from scipy.special import stdtrit

    rest = x - share[:, None, None] * whole  # (windows, prompts, seeds), of mean zero
    # t by the degrees of freedom at the estimate, and of the ceiling: the smaller, to be safe.
    variance, freedom = (part[:-1] for part in _variance(rest, factors))  # (windows,)
    whole_variance, whole_freedom = (float(part[0]) for part in _variance(whole, factors))
    both = _variance(rest + whole, factors)[0][:-1]
    covariance = (both - variance - whole_variance) / 2
    t2 = np.square(stdtrit(np.minimum(freedom, whole_freedom), tail))  # (windows,)

    # With d = r - share: (d * mean)^2 <= t^2 * (variance - 2 d covariance + d^2 whole_variance).
    square = float(whole.mean()) ** 2 - t2 * whole_variance
    linear = t2 * covariance
    root = np.sqrt(np.maximum(linear**2 + square * t2 * variance, 0))
    # Where the ceiling cannot be told from zero by this t, no share can be ruled out.
    divisor = np.where(square > 0, square, np.nan)
    return share + (-linear - root) / divisor, share + (-linear + root) / divisor


def split_seeds(seeds: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split seeds in turn into two groups: every third chooses the carrier, the others judge it.

    Deterministic. Fewer than four seeds are too few to split, and all of them serve for both. Both
    groups share the prompts, which the choice has seen: what the second group says holds for these
    prompts only.

    Raises:
        ValueError: For no seeds or repeated ones.
    """
    every = tuple(seeds)
    if not every or len(set(every)) < len(every):
        raise ValueError(f"seeds {every} cannot be split: give at least one, and none twice")
    if len(every) < 4:
        return every, every
    held_out = tuple(seed for place, seed in enumerate(every) if place % 3 != 1)
    return every[1::3], held_out


# --- textbook tests, by scipy --------------------------------------------------------------------


def welch_z(a: ArrayLike, b: ArrayLike) -> Array:
    """Two-sample z along axis 0: (n, d), (m, d) -> (d,), unitless, positive where `a` is larger.

    (mean a - mean b) / sqrt(var a/n + var b/m), unbiased variances (Welch, Biometrika 34, 1947); 0
    where a column varies in neither.

    Raises:
        ValueError: For fewer than two rows, different columns, or values that are not finite.
    """
    return _welch(a, b)[0]


def welch_p(a: ArrayLike, b: ArrayLike) -> Array:
    """Two-sided p-value of each column's `welch_z`, (d,), by Student's t.

    With Welch's degrees of freedom: the normal distribution would give p-values that are too small
    for few rows. 1 where a column varies in neither.

    Raises:
        ValueError: As `welch_z`.
    """
    return _welch(a, b)[1]


def _welch(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Welch's z and p-value of each column, (d,) each; 0 and 1 where it varies in neither."""
    from scipy.stats import ttest_ind_from_stats

    x = _checked(a, "a", ("row", "column"))
    y = _checked(b, "b", ("row", "column"))
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"a {x.shape} and b {y.shape} need the same columns and at least two rows each"
        )
    # Spreads are taken around the first row: a column that does not vary then has exactly none,
    # where rounding of its mean would leave a tiny spread and a huge z.
    spread_x = (x - x[0]).std(0, ddof=1)  # (d,)
    spread_y = (y - y[0]).std(0, ddof=1)
    z, p_value = ttest_ind_from_stats(
        x.mean(0), spread_x, len(x), y.mean(0), spread_y, len(y), equal_var=False
    )
    constant = (spread_x == 0) & (spread_y == 0)
    return np.where(constant, 0.0, z), np.where(constant, 1.0, p_value)


def student_p(t: ArrayLike, freedom: ArrayLike) -> Array:
    """P(|T| > |t|) for Student's t with `freedom` degrees of freedom, elementwise."""
    from scipy.special import stdtr

    return 2 * stdtr(freedom, -np.abs(t))


def student_quantile(tail: float, freedom: float) -> float:
    """The t with P(T > t) = `tail` for Student's t; 0 < `tail` < 0.5."""
    from scipy.special import stdtrit

    return -float(stdtrit(freedom, tail))


def false_discovery(p_values: ArrayLike) -> Array:
    """p-values adjusted for how many there are, (d,) -> (d,).

    Benjamini & Hochberg, J. R. Stat. Soc. B 57, 1995: of all entries called at adjusted p <= q, at
    most the share q is expected to be false, for tests that are independent or depend positively.
    """
    from scipy.stats import false_discovery_control

    return false_discovery_control(np.asarray(p_values, np.float64), method="bh")


def wilson(hits: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, `hits` of `count` (J. Am. Stat. Assoc. 22, 1927).

    It keeps its coverage for shares of 0 and 1.

    Args:
        hits: Number of successes. Trials must be independent: for several pictures of one prompt
            give prompts as `count`, and a `hits` that is not whole.
        count: Number of trials.
        level: Coverage of the interval.

    Returns:
        Lower and upper end, within 0 and 1.

    Raises:
        ValueError: For a count below 1, hits outside it, or a level that is not a probability.

    Example:
        >>> low, high = wilson(4, 4)
        >>> print(f"{low:.2f} {high:.2f}")
        0.51 1.00
    """
    if not 0 <= hits <= count or count < 1 or not 0 < level < 1:
        raise ValueError(
            f"{hits} hits of {count} at level {level} are no share: "
            "give 0 <= hits <= count, count >= 1"
        )
    # scipy's interval (`binomtest`) takes whole hits only; for those a test compares the two.
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = (hits + z2 / 2) / (count + z2)
    half = math.sqrt(z2 * (hits * (count - hits) / count + z2 / 4)) / (count + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def clopper_pearson(hits: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact bounds of a share, `hits` of `count` (Biometrika 26, 1934).

    Each bound holds with probability (1 + level) / 2 at least, for any share and count. So they are
    wider than `wilson`, whose bounds of a few trials fail somewhat more often than they say.

    Args:
        hits: Number of successes; not whole where trials are means of several pictures.
        count: Number of independent trials: objects or styles, not pictures or wordings of them.
        level: Coverage of the interval.

    Returns:
        Lower and upper end, within 0 and 1.

    Raises:
        ValueError: For a count below 1, hits outside it, or a level that is not a probability.

    Example:
        >>> low, high = clopper_pearson(0, 4)
        >>> print(f"{low:.2f} {high:.2f}")
        0.00 0.60
    """
    if not 0 <= hits <= count or count < 1 or not 0 < level < 1:
        raise ValueError(
            f"{hits} hits of {count} at level {level} are no share: "
            "give 0 <= hits <= count, count >= 1"
        )
    low, high = _clopper_pearson(np.asarray(hits, np.float64), count, level)
    return float(low), float(high)


def _clopper_pearson(hits: Array, count: int, level: float) -> tuple[Array, Array]:
    """As `clopper_pearson`, elementwise."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    some_hit = hits > 0
    some_missed = hits < count
    # Where a bound is 0 or 1, 1 stands in for a parameter that would be 0.
    low = betaincinv(np.where(some_hit, hits, 1), count - hits + 1, tail)
    high = betaincinv(hits + 1, np.where(some_missed, count - hits, 1), 1 - tail)
    return np.where(some_hit, low, 0.0), np.where(some_missed, high, 1.0)


# --- rank correlation ----------------------------------------------------------------------------


class Correlation(NamedTuple):
    """Spearman's rank correlation of two profiles of means, with its interval."""

    estimate: float
    low: float
    high: float


def rank_correlation(
    one: ArrayLike, two: ArrayLike, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Spearman's correlation over layers of two profiles, with its interval.

    Prompts and seeds are resampled as in `crossed_bootstrap`, the same ones for both profiles where
    both have equally many.

    Args:
        one: Effects of each layer, (layers, prompts, seeds).
        two: The same layers, (layers, prompts, seeds), of any prompts and seeds.
        draws: Number of bootstrap resamples.
        level: Coverage of the interval.
        seed: Seed of the resampling.

    Returns:
        The correlation, NaN where a profile is flat; its bounds are NaN for one seed and fewer than
        six prompts.

    Raises:
        ValueError: For different numbers of layers, or fewer than three.
    """
    x = np.asarray(one, np.float64)
    y = np.asarray(two, np.float64)
    if x.ndim != 3 or y.ndim != 3 or len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"profiles have shapes {x.shape} and {y.shape}: "
            "give (layers, prompts, seeds) of three or more"
        )
    estimate = float(_spearman(x.mean((1, 2))[None], y.mean((1, 2))[None])[0])
    resampled = "random" in _factors(x, None) or "random" in _factors(y, None)
    if not np.isfinite(estimate) or not resampled:
        return Correlation(estimate, np.nan, np.nan)
    again = _spearman(_resampled(x, draws, seed), _resampled(y, draws, seed))  # (draws,)
    again = again[np.isfinite(again)]
    # Noise alone makes rankings less alike, so resampled correlations are too low. The interval
    # covers both the percentile and the reversed percentile one (Davison & Hinkley 1997, section
    # 5.2), on Fisher's scale.
    ends = _fisher(np.quantile(again, [(1 - level) / 2, (1 + level) / 2]))
    both = np.tanh([*ends, *(2 * _fisher(estimate) - ends)])
    return Correlation(estimate, float(both.min()), float(both.max()))


def _resampled(values: Array, draws: int, seed: int) -> Array:
    """Resampled profiles, (draws, layers), as wide as in `crossed_bootstrap`."""
    factors = _factors(values, None)
    means = values.mean((1, 2))  # (layers,)
    if "random" not in factors:
        return np.repeat(means[None], draws, 0)
    variance, freedom = _variance(values, factors)
    deviations = _scaled(_deviations(values, draws, seed, factors), variance[:-1])
    return means + deviations / _student(freedom[-1], draws, seed)[:, None]


def _fisher(correlation: ArrayLike) -> Array:
    return np.arctanh(np.clip(correlation, -0.999, 0.999))


def _spearman(x: Array, y: Array) -> Array:
    """Pearson's correlation of the ranks, row by row, (rows, layers) -> (rows,).

    scipy's `spearmanr` compares all rows with all rows, thousands of resamples too many.
    """
    from scipy.stats import rankdata

    middle = (x.shape[1] + 1) / 2
    a = rankdata(x, axis=1) - middle  # (rows, layers); equal values share their mean rank
    b = rankdata(y, axis=1) - middle
    with np.errstate(invalid="ignore"):  # a flat profile has no correlation: NaN
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


# --- from tables ---------------------------------------------------------------------------------


def cube(table: Any, value: str, by: Mapping[str, Sequence[Any]]) -> Array:
    """A column of a table as an array with one axis for each column that the table is ordered by.

    Args:
        table: A pandas table with at most one row for each combination of levels.
        value: The column to take.
        by: Column -> its levels, in the order of the axis, as in {"prompt": prompts, "seed":
            seeds}.

    Returns:
        An array of shape (levels of the first column, levels of the second, ...); NaN for missing
        rows.
    """
    import pandas as pd

    values = np.full([len(levels) for levels in by.values()], np.nan)
    places = np.array(
        [pd.Index(levels).get_indexer(table[column]) for column, levels in by.items()]
    )
    inside = (places >= 0).all(0)  # (rows,); rows of other levels have no place
    column = table[value].to_numpy(np.float64, na_value=np.nan)
    values[tuple(places[:, inside])] = column[inside]
    return values


# --- resampling ----------------------------------------------------------------------------------


def _compare(
    x: Array,
    pairs: Sequence[tuple[int, int]],
    alpha: float,
    draws: int,
    seed: int,
    prompts: str | None,
) -> Comparisons:
    """One-sided single-step max-t (Westfall & Young 1993) over pairs (i, j) of rows: is i above j?

    All rows of `x` (rows, prompts, seeds) share the resampled prompts and seeds.
    """
    rank = int(alpha * (draws + 1) + 1e-9)  # the rank-th largest maximum is the critical value
    if not 1 <= rank <= draws:
        raise ValueError(
            f"alpha={alpha} is not between 0 and 1, or draws={draws} are fewer than 1 / alpha"
        )
    factors = _factors(x, prompts)
    i, j = np.array(pairs).T
    gap = x[i].mean((1, 2)) - x[j].mean((1, 2))  # (pairs,)
    if "random" not in factors:
        unknown = np.full_like(gap, np.nan)
        return Comparisons(gap, unknown, unknown.copy(), *factors)

    # One pair's variance from few seeds is too uncertain to divide by: each t is moderated (Tusher
    # et al. 2001, Smyth 2004), half the pair's own variance, half the family's mean.
    variance, freedom = _variance(x[i] - x[j], factors)
    moderated = (variance[:-1] + variance[-1]) / 2
    scale = np.maximum(np.sqrt(moderated), TINY)  # (pairs,)

    deviations = _deviations(x, draws, seed, factors)  # (draws, rows)
    t_draws = _scaled(deviations[:, i] - deviations[:, j], variance[:-1]) / scale  # (draws, pairs)
    # Divided by sqrt(chi2/df), with the df of the family's mean variances: maxima of Student's t.
    peaks = np.sort(t_draws.max(1) / _student(freedom[-1], draws, seed))  # (draws,)
    smaller = np.searchsorted(peaks, gap / scale)  # how many maxima lie below each t
    p_value = (1 + draws - smaller) / (1 + draws)
    return Comparisons(gap, gap - peaks[-rank] * scale, p_value, *factors)


def _factors(x: Array, prompts: str | None) -> tuple[str, str]:
    """Whether (prompts, seeds) are "random" or "fixed"."""
    _, prompt_count, seed_count = x.shape
    if not prompts:
        prompts = "random" if prompt_count >= FEW_PROMPTS else "fixed"
    if prompts not in ("random", "fixed"):
        raise ValueError(f"prompts={prompts!r} is not known: use 'random', 'fixed' or None")
    if prompts == "random" and prompt_count < 2:
        raise ValueError("one prompt cannot be resampled: give more prompts, or prompts='fixed'")
    # One seed shows nothing of how others would differ.
    seeds = "random" if seed_count > 1 else "fixed"
    return prompts, seeds


def _deviations(x: Array, draws: int, seed: int, factors: tuple[str, str]) -> Array:
    """Resampled minus actual means, (draws, windows); the same draws for every window."""
    dice = np.random.default_rng(seed)  # prompts first: the order is part of every published number
    prompt_weights = _weights(x.shape[1], draws, factors[0], dice)  # (draws, prompts)
    seed_weights = _weights(x.shape[2], draws, factors[1], dice)  # (draws, seeds)
    centered = x - x.mean((1, 2), keepdims=True)
    by_prompt = np.tensordot(prompt_weights, centered, axes=(1, 1))  # (draws, windows, seeds)
    return np.einsum("dws,ds->dw", by_prompt, seed_weights)


def _weights(count: int, draws: int, how: str, dice: np.random.Generator) -> Array:
    """How often each of `count` is drawn, as shares, (draws, count); equal if fixed."""
    equal = np.full(count, 1 / count)
    if how == "fixed":
        return np.tile(equal, (draws, 1))
    return dice.multinomial(count, equal, draws) / count


def _variance(x: Array, factors: tuple[str, str]) -> tuple[Array, Array]:
    """Variances of means, their degrees of freedom; last, of the average, (windows + 1,).

    Degrees of freedom after Satterthwaite (1946).
    """
    x = x - x[:, :1, :1]  # a window that does not vary is exactly zero from here on
    from_prompts = _variance_of_mean(x.mean(2), factors[0])  # (windows + 1,)
    from_seeds = _variance_of_mean(x.mean(1), factors[1])
    total = from_prompts + from_seeds
    share = from_prompts / np.maximum(total, TINY)
    prompt_freedom = max(x.shape[1] - 1, 1)
    seed_freedom = max(x.shape[2] - 1, 1)
    return total, 1 / (share**2 / prompt_freedom + (1 - share) ** 2 / seed_freedom)


def _variance_of_mean(means: Array, how: str) -> Array:
    """Variance of each row's mean, (windows, levels) -> (windows + 1,); last, their average."""
    variance = np.zeros(len(means))
    if how == "random":
        variance = means.var(1, ddof=1) / means.shape[1]
    return np.append(variance, variance.mean())


def _scaled(deviations: Array, variance: Array) -> Array:
    """Deviations (draws, k), stretched to have mean square `variance` (k,)."""
    size = np.maximum(np.sqrt(np.square(deviations).mean(0)), TINY)
    return deviations * (np.sqrt(variance) / size)


def _student(freedom: float, draws: int, seed: int) -> Array:
    """What normal draws are divided by to become Student's t: sqrt(chi2 / freedom), (draws,)."""
    dice = np.random.default_rng([seed, 1])
    return np.sqrt(dice.standard_gamma(freedom / 2, draws) * 2 / freedom)


def _checked(
    values: ArrayLike, name: str, axes: tuple[str, ...] = ("window", "prompt", "seed")
) -> Array:
    """The values as an array, refused unless it has these axes, is not empty and is finite."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != len(axes) or x.size == 0:
        expected = "s, ".join(axes)
        raise ValueError(f"{name} has shape {x.shape}, expected a non-empty ({expected}s)")
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        first = tuple(bad[0])
        place = ", ".join(f"{axis} {k}" for axis, k in zip(axes, first, strict=True))
        raise ValueError(f"{name} is {x[first]} at {place} ({len(bad)} in all): score it again")
    return x
