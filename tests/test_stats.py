"""Intervals and comparisons: what must hold exactly, and what only a simulation can show."""

import math
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from locogen import stats

ALPHA = 0.05
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 5))
SCORES = SHAPES.flatmap(
    lambda shape: hnp.arrays(float, shape, elements=st.integers(-50, 50).map(lambda k: k / 50))
)


def larger(*values):
    """Further sizes of a property that smaller ones show too, in the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slack(rate: float, trials: int) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * float(np.sqrt(rate * (1 - rate) / trials))


def crossed(rng, shape, *, prompts=1.0, seeds=0.5, rest=1.0):
    """Scores of mean zero with a prompt part, a seed part and their interaction."""
    n, p, s = shape
    parts = (
        prompts * rng.normal(size=(n, p, 1)),
        seeds * rng.normal(size=(n, 1, s)),
        rest * rng.normal(size=shape),
    )
    return sum(parts)


def sweep(rng, *shape, windows=15, **parts):
    """Null effects as a sweep has them: the baseline is shared, and neighboring windows share a layer."""
    x = crossed(rng, (windows + 1, *shape), **parts)
    return x[1:] + x[:-1] + crossed(rng, (1, *shape))


def interval(values, **kwargs):
    result = stats.crossed_bootstrap(values, **{"yes_no": False} | kwargs)
    return np.stack([result.low, result.estimate, result.high])


# ---- intervals: identities


@given(SCORES, st.floats(-10, 10), st.floats(0.01, 100))
def test_an_interval_moves_and_stretches_with_the_scores(x, shift, scale):
    moved = interval(shift + scale * x, draws=100)
    np.testing.assert_allclose(
        moved, shift + scale * interval(x, draws=100), atol=1e-6 * (1 + scale)
    )


@given(SCORES)
def test_an_interval_holds_the_mean_and_needs_no_other_window(x):
    low, estimate, high = interval(x, draws=400)
    np.testing.assert_allclose(estimate, x.mean((1, 2)), atol=1e-12)
    if not np.isnan(low).any():
        assert (low <= estimate + 1e-12).all() and (estimate <= high + 1e-12).all()
    alone = [interval(w, draws=400) for w in x]
    np.testing.assert_allclose(np.stack(alone, axis=1), [low, estimate, high], atol=1e-12)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_order_of_prompts_and_seeds_does_not_matter(axis):
    rng = np.random.default_rng(1)
    x = crossed(rng, (5, 9, 5))
    here, there = interval(x, draws=20_000), interval(rng.permutation(x, axis=axis), draws=20_000)
    np.testing.assert_allclose(there[1], here[1], atol=1e-12)
    np.testing.assert_allclose(
        there, here, atol=0.05 * float((here[2] - here[0]).max())
    )  # other draws


def test_a_higher_level_is_wider_and_the_same_seed_the_same():
    x = crossed(np.random.default_rng(2), (3, 6, 4))
    narrow, wide = interval(x, level=0.8), interval(x, level=0.99)
    assert (wide[0] < narrow[0]).all() and (narrow[2] < wide[2]).all()
    np.testing.assert_array_equal(interval(x), interval(x))
    assert (interval(x) != interval(x, seed=1))[[0, 2]].all()


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 3, 4), (2, 6, 1), (2, 1, 4)])
def test_constant_scores_have_no_width(shape):
    low, estimate, high = interval(np.full(shape, 0.1))
    np.testing.assert_array_equal(low, estimate)
    np.testing.assert_array_equal(high, estimate)


def test_the_result_says_what_it_speaks_for():
    def said(p, s, **kwargs):
        result = stats.crossed_bootstrap(crossed(np.random.default_rng(3), (2, p, s)), **kwargs)
        assert (
            np.isnan(result.low).all()
            == np.isnan(result.high).all()
            == (result.prompts == result.seeds == "fixed")
        )
        return result.prompts, result.seeds

    assert said(6, 4) == ("random", "random")
    assert said(5, 4) == said(1, 4) == said(6, 4, prompts="fixed") == ("fixed", "random")
    assert said(2, 4, prompts="random") == ("random", "random")
    assert said(6, 1) == ("random", "fixed")
    assert said(5, 1) == said(1, 1) == ("fixed", "fixed")  # nothing to resample: no interval
    assert stats.crossed_bootstrap(np.ones((6, 4))).estimate.shape == ()
    assert stats.crossed_bootstrap(np.ones((2, 3, 6, 4))).low.shape == (2, 3)


def test_fixed_prompts_ignore_how_prompts_differ():
    x = crossed(np.random.default_rng(4), (1, 4, 4))
    apart = x + 4.0 * np.arange(4)[None, :, None]
    low, estimate, high = interval(apart) - interval(x)
    np.testing.assert_allclose([low, high], [estimate, estimate], atol=1e-12)
    assert np.ptp(interval(apart, prompts="random")) > 2 * np.ptp(interval(apart))


# ---- intervals: coverage


def covered(low, high, truth=0.0):
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize(
    ("prompts", "seeds", "parts"),
    [
        (6, 4, {}),  # the smallest sweep that speaks for other prompts
        (6, 4, {"prompts": 0.2, "seeds": 1.0, "rest": 0.5}),
        (12, 4, {"seeds": 1.0}),
        larger(12, 8, {"seeds": 0.2, "rest": 0.5}),
        larger(12, 8, {"prompts": 0.0, "seeds": 0.0}),
    ],
)
def test_coverage_of_the_crossed_bootstrap(prompts, seeds, parts):
    x = crossed(np.random.default_rng(5), (2000, prompts, seeds), **parts)
    low, _, high = interval(x, draws=1000)
    assert covered(low, high) > 0.95 - slack(0.95, len(x))


@pytest.mark.parametrize(("prompts", "seeds"), [(6, 4), larger(12, 8)])
def test_a_bootstrap_over_single_pictures_covers_far_too_little(prompts, seeds):
    rng, n, cells = np.random.default_rng(6), 2000, prompts * seeds
    x = crossed(rng, (n, prompts, seeds))
    weights = rng.multinomial(cells, np.full(cells, 1 / cells), 500) / cells
    low, high = np.quantile(x.reshape(n, cells) @ weights.T, [0.025, 0.975], axis=1)
    assert (
        covered(low, high)
        < 0.85
        < 0.95 - slack(0.95, n)
        < covered(*interval(x, draws=1000)[[0, 2]])
    )


def test_bare_percentiles_of_owens_draws_cover_too_little():
    rng, n = np.random.default_rng(7), 2000
    x = crossed(rng, (n, 6, 4), prompts=0.2, seeds=1.0, rest=0.5)
    u, v = (rng.multinomial(k, np.full(k, 1 / k), 500) / k for k in (6, 4))
    low, high = np.quantile(
        np.einsum("dp,nps,ds->nd", u, x, v, optimize=True), [0.025, 0.975], axis=1
    )
    assert covered(low, high) < 0.9


@pytest.mark.parametrize("seeds", [2, 4, larger(8)])
def test_coverage_for_these_prompts(seeds):
    x = crossed(np.random.default_rng(8), (2000, 3, seeds), prompts=0.0) + np.array(
        [[0.0], [3.0], [9.0]]
    )
    low, _, high = interval(x, draws=1000)
    assert covered(low, high, truth=4.0) > 0.95 - 2 * slack(0.95, len(x))


# ---- yes/no scores, and effects that are missing on some prompts


@pytest.mark.parametrize(("prompts", "seeds"), [(1, 4), (2, 4), (4, 4), (3, 8)])
@pytest.mark.parametrize("share", [0.95, 0.8, 0.6])
@pytest.mark.parametrize("alike", [False, True])
def test_coverage_of_yes_no_scores(prompts, seeds, share, alike):
    """Few pictures often agree by luck. Also where a seed moves all prompts alike; the twin has no floor."""
    rng, trials = np.random.default_rng(30), 300
    luck = rng.random((trials, 1 if alike else prompts, seeds))
    x = np.broadcast_to(luck < share, (trials, prompts, seeds)).astype(float)
    low, _, high = interval(x, draws=200, yes_no=None)
    assert covered(low, high, share) > 0.95 - slack(0.95, trials)
    low, _, high = interval(x, draws=200, yes_no=False)
    agree = (x == x[:, :1, :1]).all((1, 2))  # (trials,)
    assert (low == high)[agree].all()
    assert not ((low <= share) & (share <= high))[agree].any()
    assert share < 0.95 or agree.mean() > 0.25, "and that is often"


@pytest.mark.parametrize(("gained", "lost"), [(0.8, 0.05), (0.1, 0.1), (0.02, 0.02)])
def test_coverage_of_differences_of_yes_no_scores(gained, lost):
    rng, trials = np.random.default_rng(31), 300
    luck = rng.random((trials, 2, 4))
    x = (luck < gained).astype(float) - (luck > 1 - lost)
    low, _, high = interval(x, draws=200, yes_no=None)
    assert covered(low, high, gained - lost) > 0.95 - slack(0.95, trials)
    assert (high > low).all()


@pytest.mark.parametrize("prompts", [6, 8])
def test_a_yes_no_effect_that_is_missing_on_one_prompt_in_eight_is_covered(prompts):
    rng, trials = np.random.default_rng(32), 300
    x = np.repeat((rng.random((trials, prompts, 1)) < 7 / 8).astype(float), 4, axis=2)
    low, _, high = interval(x, draws=200, yes_no=None)
    assert covered(low, high, 7 / 8) > 0.95 - slack(0.95, trials)
    low, _, high = interval(x, draws=200)
    assert covered(low, high, 7 / 8) < 0.75


@pytest.mark.parametrize("prompts", [6, 8])
def test_the_count_of_prompts_says_how_many_may_lack_an_effect(prompts):
    """Continuous scores cannot show a prompt that is not among them; the bound of the count covers their share."""
    rng, trials = np.random.default_rng(33), 300
    shows = rng.random((trials, prompts, 1)) < 7 / 8
    x = np.where(shows, 0.4, 0.0) + 0.02 * crossed(rng, (trials, prompts, 4))
    low, _, high = interval(x, draws=200)
    assert covered(low, high, 0.4 * 7 / 8) < 0.75, "the twin: the interval of the mean"
    count, low, high = stats.showing_prompts(x)
    on_most = shows.mean((1, 2)) > 0.5
    np.testing.assert_array_equal(count[on_most], shows.sum((1, 2))[on_most])
    assert covered(low, high, 7 / 8) > 0.95
    count, low, _ = stats.showing_prompts(-x)
    assert not count.any() and np.isnan(low).all()


def test_continuous_scores_have_no_floor():
    x = crossed(np.random.default_rng(34), (4, 6, 4))
    x[0] = 0.3  # without any spread
    found = interval(x, yes_no=None)
    np.testing.assert_array_equal(found, interval(x))
    assert found[0][0] == found[2][0]
    assert (interval(x, yes_no=True)[2] >= found[2]).all()


def test_a_window_without_any_effect_has_the_floor_of_its_column():
    """All zeros among yes/no scores are a share of none; zeros alone may be a difference of any scores."""
    x = np.zeros((2, 6, 4))
    x[1] = 1
    low, _, high = interval(x, yes_no=None)
    np.testing.assert_allclose(high[0], stats.clopper_pearson(0, 4)[1])
    np.testing.assert_allclose([low[0], low[1], high[1]], [-high[0], 1 - high[0], 1])
    assert not interval(x[:1], yes_no=None).any()
    assert not stats.is_yes_no(x[:1]) and not stats.is_yes_no(x / 2) and stats.is_yes_no(-x)


def test_clopper_pearson_is_scipys_and_each_bound_holds():
    from scipy.stats import binom, binomtest

    for hits, count, level in ((0, 10, 0.95), (3, 10, 0.95), (10, 10, 0.8), (17, 60, 0.99)):
        exact = binomtest(hits, count).proportion_ci(level, method="exact")
        assert stats.clopper_pearson(hits, count, level) == pytest.approx((exact.low, exact.high))
    upper = np.array([stats.clopper_pearson(hits, 4)[1] for hits in range(5)])
    wilson = np.array([stats.wilson(hits, 4)[1] for hits in range(5)])
    for share in np.linspace(0.02, 0.98, 49):
        rates = binom.pmf(np.arange(5), 4, share)
        assert rates[upper >= share].sum() >= 0.975
    assert binom.pmf(np.arange(5), 4, 0.55)[wilson >= 0.55].sum() < 0.975, "the twin"


# ---- shares of the ceiling


def shares(rng, truth, *shape, ceiling=4.0, trials=400, **parts):
    """Of a window with this true share: the intervals, and those that take the ceiling as known."""
    fieller, naive = [], []
    for _ in range(trials):
        whole = ceiling + crossed(rng, (1, *shape), **parts)
        effects = truth * ceiling + 0.2 * crossed(rng, (1, *shape), **parts)
        fieller.append(np.ravel(stats.share_interval(effects, whole)))
        of_effect = stats.crossed_bootstrap(effects, draws=200)
        naive.append(np.ravel([of_effect.low, of_effect.high]) / whole.mean())
    return np.array(fieller), np.array(naive)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 4), {"prompts": 0.0}),
        larger((3, 4), {"prompts": 0.0}),
        ((6, 4), {}),
        larger((8, 6), {"prompts": 0.2, "seeds": 1.0, "rest": 0.5}),
    ],
)
def test_the_interval_of_a_share_covers_it_and_one_of_the_effect_alone_does_not(shape, parts):
    found, naive = shares(np.random.default_rng(20), 0.8, *shape, **parts)
    given = found[~np.isnan(found[:, 0])]  # the ceiling is four spreads high: hardly ever refused
    assert len(given) > 0.95 * len(found)
    assert covered(given[:, 1], given[:, 2], 0.8) > 0.95 - slack(0.95, len(given))
    assert covered(naive[:, 0], naive[:, 1], 0.8) < 0.8


def test_luck_that_window_and_ceiling_share_cancels():
    """A window that does on every picture 0.6 of what the ceiling does has that share exactly."""
    whole = 1 + 0.3 * crossed(np.random.default_rng(21), (1, 6, 4))
    effects = np.concatenate([0.6 * whole, whole])
    for part in stats.share_interval(effects, whole):
        np.testing.assert_allclose(part, [0.6, 1.0], atol=1e-6)
    rng = np.random.default_rng(22)
    apart = stats.share_interval(0.6 + 0.3 * crossed(rng, (1, 6, 4)), whole)
    assert apart.high[0] - apart.low[0] > 0.1, "the twin: luck of its own stays"


def test_a_share_of_nothing_is_refused():
    """Effects of 0.3 over a ceiling of 0.02 in noise: a share of 1612 % says nothing."""
    rng, refused = np.random.default_rng(23), 0
    for _ in range(200):
        whole = 0.02 + 0.1 * crossed(rng, (1, 6, 4))
        refused += np.isnan(stats.share_interval(np.full((1, 6, 4), 0.3), whole)).all()
    assert refused / 200 > 0.95
    assert np.isnan(stats.share_interval(np.ones((2, 3, 4)), np.full((1, 3, 4), -0.3))).all()
    sure = stats.share_interval(np.full((1, 6, 4), 0.3), 0.4 + 0.01 * whole)
    assert 0.6 < sure.low[0] <= sure.estimate[0] <= sure.high[0] < 0.9, "the twin"


def test_a_share_without_anything_to_resample_has_no_interval():
    share, low, high = stats.share_interval(np.ones((2, 5, 1)), np.full((1, 5, 1), 2.0))
    assert share.tolist() == [0.5, 0.5] and np.isnan([low, high]).all()


def test_a_higher_level_widens_a_share():
    rng = np.random.default_rng(24)
    effects, whole = (mean + 0.1 * crossed(rng, (3, 6, 4)) for mean in (0.5, 1.0))
    narrow, wide = (stats.share_interval(effects, whole[:1], level=level) for level in (0.9, 0.99))
    assert (wide.low < narrow.low).all() and (narrow.high < wide.high).all()


# ---- the lead of a candidate


def alone(x, i, j):
    """Uncorrected twin: one-sided at ALPHA for each pair on its own."""
    return stats.crossed_bootstrap(x[i] - x[j], level=1 - 2 * ALPHA, draws=400).low > 0


@pytest.mark.parametrize(("prompts", "seeds"), [(8, 4), (4, 4), larger(12, 2)])
def test_false_alarms_when_all_windows_are_equal(prompts, seeds):
    part = (
        1.0 if prompts >= stats.FEW_PROMPTS else 0.0
    )  # equal "for these prompts" means equal in each
    rng, trials = np.random.default_rng(9), 250
    corrected, twin = 0, 0
    for _ in range(trials):
        x = sweep(rng, prompts, seeds, prompts=part, rest=0.5)
        best = int(x.mean((1, 2)).argmax())
        lead = stats.simultaneous_lead(x, best, apart=2, draws=400)
        corrected += bool((lead.each.low > 0).any())
        twin += bool(alone(x, best, list(lead.rivals)).any())
    assert corrected / trials <= ALPHA + slack(ALPHA, trials)
    assert twin / trials > 5 * ALPHA


def test_false_alarms_when_two_windows_tie_for_the_lead():
    rng, trials = np.random.default_rng(10), 500
    found = dict(corrected=0, elsewhere=0, twin=0)
    for _ in range(trials):
        x = crossed(rng, (5, 12, 8), seeds=0.0, rest=0.2)
        x[2:] -= 10.0
        best = int(x.mean((1, 2)).argmax())
        found["corrected"] += stats.simultaneous_lead(x, best, draws=400).p_value <= ALPHA
        found["elsewhere"] += (
            stats.simultaneous_lead(x, 0, chosen_here=False, draws=400).p_value <= ALPHA
        )
        found["twin"] += bool(alone(x, best, [r for r in range(5) if r != best]).all())
    assert found["corrected"] / trials <= ALPHA + slack(ALPHA, trials)
    assert found["elsewhere"] / trials <= ALPHA + slack(ALPHA, trials)
    assert found["twin"] / trials > ALPHA + slack(ALPHA, trials)  # choosing the winner doubles it


def test_false_alarms_on_seeds_not_used_to_choose():
    rng, trials = np.random.default_rng(11), 400
    found = dict(fresh=0, same_seeds=0, other_prompts=0)

    def alarm(x, best, how):
        lead = stats.simultaneous_lead(x, best, chosen_here=False, draws=400, prompts=how)
        return bool((lead.each.low > 0).any())

    for _ in range(trials):
        for part, how in ((0.0, "fixed"), (3.0, "random")):
            x = sweep(rng, 8, 8, prompts=part, rest=0.5)
            choose, report = (x[..., list(half)] for half in stats.split_seeds(range(8)))
            best = int(choose.mean((1, 2)).argmax())
            if how == "fixed":
                found["fresh"] += alarm(report, best, how)
                found["same_seeds"] += alarm(x, int(x.mean((1, 2)).argmax()), how)
            else:  # fresh seeds do not undo a choice made on these prompts
                found["other_prompts"] += alarm(report, best, how)
    assert found["fresh"] / trials <= ALPHA + slack(ALPHA, trials)
    assert found["same_seeds"] / trials > 2 * ALPHA + slack(ALPHA, trials)
    assert found["other_prompts"] / trials > 2 * ALPHA + slack(ALPHA, trials)


@pytest.mark.parametrize(("prompts", "seeds"), [(6, 6), larger(12, 8)])
def test_a_tie_among_all_prompts_is_no_lead(prompts, seeds):
    """Two places as good as each other, with luck of their own on each prompt, as in the mini model.

    Chosen on all seeds, corrected, prompts drawn anew: rarely a lead. The twin chooses on some seeds, judges on the
    others and takes the prompts as given: it declares the luck of these prompts a lead.
    """
    rng, trials = np.random.default_rng(25), 200
    found = dict(all_seeds=0, split=0)
    for _ in range(trials):
        x = 0.5 + 0.1 * crossed(rng, (5, prompts, seeds), prompts=1.8, seeds=0.3)
        x[2:] -= 10.0
        best = int(x.mean((1, 2)).argmax())
        found["all_seeds"] += stats.simultaneous_lead(x, best, draws=400).p_value <= ALPHA
        choose, judge = (x[..., list(part)] for part in stats.split_seeds(range(seeds)))
        best = int(choose.mean((1, 2)).argmax())
        lead = stats.simultaneous_lead(judge, best, chosen_here=False, draws=400, prompts="fixed")
        found["split"] += lead.p_value <= ALPHA
    assert found["all_seeds"] / trials <= ALPHA
    assert found["split"] / trials > 0.15


@pytest.mark.parametrize(("prompts", "seeds"), [(4, 4), (6, 4), larger(12, 8)])
def test_the_estimate_of_a_chosen_window_holds(prompts, seeds):
    """Fifteen windows of the same effect, the luckiest is chosen on all seeds: its interval covers the effect.

    The twin's interval is that of a window named beforehand.
    """
    rng, trials = np.random.default_rng(26), 200
    part = 1.0 if prompts >= stats.FEW_PROMPTS else 0.0
    covers = dict(together=0, alone=0)
    for _ in range(trials):
        x = 0.5 + 0.1 * sweep(rng, prompts, seeds, prompts=part, rest=0.5)
        best = int(x.mean((1, 2)).argmax())
        for name, how in (
            ("together", stats.simultaneous_intervals),
            ("alone", stats.crossed_bootstrap),
        ):
            found = how(x, draws=400)
            covers[name] += found.low[best] <= 0.5 <= found.high[best]
    assert covers["together"] / trials >= 0.95 - slack(0.95, trials)
    assert covers["alone"] / trials < 0.9


def test_intervals_that_hold_together_are_wider_and_say_as_much():
    x = sweep(np.random.default_rng(27), 8, 4)
    alone, together = stats.crossed_bootstrap(x), stats.simultaneous_intervals(x)
    np.testing.assert_allclose(together.estimate, alone.estimate)
    assert (together.low < alone.low).all() and (alone.high < together.high).all()
    assert (together.prompts, together.seeds) == ("random", "random")
    nothing = stats.simultaneous_intervals(x[:, :5, :1])
    assert nothing.prompts == nothing.seeds == "fixed" and np.isnan(nothing.low).all()


@pytest.mark.parametrize(("prompts", "seeds"), [larger(12, 8), (8, 4), (4, 4)])
def test_a_real_carrier_is_found(prompts, seeds):
    rng, trials, found, covers = np.random.default_rng(12), 50, 0, 0
    for _ in range(trials):
        x = 0.02 * sweep(rng, prompts, seeds)
        x[8] += 0.15
        lead = stats.simultaneous_lead(x, 8, apart=2)
        found += lead.low > 0
        covers += bool((lead.each.low <= 0.15).all())
    assert found / trials > 0.9
    assert covers / trials >= 0.95 - slack(0.95, trials)


@given(
    SHAPES.filter(lambda s: s[0] > 1).flatmap(
        lambda s: hnp.arrays(float, s, elements=st.integers(-5, 5))
    )
)
def test_what_a_lead_is_made_of(x):
    best = int(x.mean((1, 2)).argmax())
    lead = stats.simultaneous_lead(x, best, draws=200)
    others = np.delete(x.mean((1, 2)), best)
    assert (
        lead.lead == pytest.approx(x.mean((1, 2))[best] - others.max(), abs=1e-12)
        and lead.lead >= 0
    )
    assert x.mean((1, 2))[lead.rival] == pytest.approx(others.max())
    assert lead.rivals == tuple(w for w in range(len(x)) if w != best)
    if lead.each.prompts == lead.each.seeds == "fixed":
        assert np.isnan([lead.low, lead.p_value]).all()
        return
    np.testing.assert_array_equal(lead.each.low > 0, lead.each.p_value <= ALPHA)
    assert (lead.each.low <= lead.each.estimate + 1e-12).all() and lead.low <= lead.lead + 1e-12
    assert 1 / 201 <= lead.p_value <= 1
    fewer = stats.simultaneous_lead(x, best, chosen_here=False, draws=200)
    if len(x) == 2 and lead.lead > 0:  # the family of a chosen one has the other direction too
        assert fewer.p_value <= lead.p_value


def test_a_lead_moves_with_nothing_and_stretches_with_the_scores():
    x = sweep(np.random.default_rng(13), 8, 4)
    here, there = (stats.simultaneous_lead(y, 3, apart=2) for y in (x, 7 + 4 * x))
    np.testing.assert_allclose([there.lead, there.low], [4 * here.lead, 4 * here.low], atol=1e-9)
    np.testing.assert_allclose(there.each.p_value, here.each.p_value)
    assert here.rivals == (0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
    assert stats.simultaneous_lead(x, 3, [14, 0, 14]).rivals == (14, 0)


def test_a_lead_without_any_spread_is_certain():
    x = np.zeros((3, 6, 4)) + np.array([0.5, 0.0, 0.5])[:, None, None]
    lead = stats.simultaneous_lead(x, 0, draws=199)
    assert (lead.lead, lead.rival, lead.low, lead.p_value) == (0, 2, 0, 1)
    np.testing.assert_array_equal(lead.each.low, [0.5, 0])
    np.testing.assert_allclose(lead.each.p_value, [1 / 200, 1])


def test_choosing_and_testing_on_the_same_pictures_costs_something():
    x = sweep(np.random.default_rng(14), 8, 4)
    same, other = (stats.simultaneous_lead(x, 4, chosen_here=here) for here in (True, False))
    assert (same.each.low < other.each.low).all() and (
        same.each.p_value >= other.each.p_value
    ).all()


# ---- any effect beyond the placebo


@pytest.mark.parametrize(("prompts", "seeds"), [(8, 4), (4, 4)])
def test_false_alarms_against_the_placebo(prompts, seeds):
    rng, trials = np.random.default_rng(15), 400
    part = 1.0 if prompts >= stats.FEW_PROMPTS else 0.0
    corrected, twin = 0, 0
    for _ in range(trials):
        x = crossed(rng, (16, prompts, seeds), prompts=part, rest=0.5)
        corrected += bool(stats.any_effect(x[1:], x[0], draws=400).p_value.min() <= ALPHA)
        twin += bool(alone(x, list(range(1, 16)), 0).any())
    assert corrected / trials <= ALPHA + slack(ALPHA, trials)
    assert twin / trials > 2 * ALPHA + slack(ALPHA, trials)


def test_an_effect_beyond_the_placebo_is_found_where_it_is():
    rng = np.random.default_rng(16)
    placebo = 0.01 * crossed(rng, (3, 8, 4))
    x = 0.01 * crossed(rng, (15, 8, 4))
    x[[3, 9]] += 0.1
    result = stats.any_effect(x, placebo)
    assert set(np.flatnonzero(result.p_value <= ALPHA)) == {3, 9}
    np.testing.assert_array_equal(result.low > 0, result.p_value <= ALPHA)
    np.testing.assert_allclose(result.estimate, x.mean((1, 2)) - placebo.mean())
    flat = stats.any_effect(x, placebo.mean(0))
    np.testing.assert_allclose(flat.low, result.low)
    assert (result.prompts, result.seeds) == ("random", "random")


# ---- the rest


@given(st.lists(st.integers(), min_size=4, unique=True))
def test_seeds_are_split_without_loss(seeds):
    choose, report = stats.split_seeds(seeds)
    assert sorted(choose + report) == sorted(seeds) and 0 < len(choose) <= len(report)
    assert stats.split_seeds(iter(seeds)) == (choose, report)


def test_seeds_are_split_in_turn():
    assert stats.split_seeds(range(8)) == ((1, 4, 7), (0, 2, 3, 5, 6))
    assert stats.split_seeds(range(3)) == ((0, 1, 2), (0, 1, 2)), "too few to split"


def test_welch_z_column_by_column():
    rng = np.random.default_rng(17)
    a, b = rng.normal(1, 2, (7, 5)), rng.normal(0, 1, (4, 5))
    a[:, 2], b[:, 2] = 0.1, 0.3  # silent in both: no z
    a[:, 3] = 0.1  # silent in one
    z = stats.welch_z(a, b)
    for k in (0, 1, 3, 4):
        mean_a, mean_b = sum(a[:, k]) / 7, sum(b[:, k]) / 4
        error = sum((a[:, k] - mean_a) ** 2) / 6 / 7 + sum((b[:, k] - mean_b) ** 2) / 3 / 4
        assert z[k] == pytest.approx((mean_a - mean_b) / error**0.5)
    assert z[2] == 0
    np.testing.assert_allclose(stats.welch_z(b, a), -z)
    np.testing.assert_allclose(stats.welch_z(3 + 2 * a, 3 + 2 * b)[[0, 1, 3, 4]], z[[0, 1, 3, 4]])


def test_student_p_is_the_tabulated_one():
    """Critical values of printed tables, closed forms at 1 and 2 degrees of freedom, the normal limit."""
    tabulated = [
        (12.706, 1, 0.05),
        (4.303, 2, 0.05),
        (2.776, 4, 0.05),
        (3.169, 10, 0.01),
        (2.042, 30, 0.05),
    ]
    for t, freedom, p in tabulated:
        assert stats.student_p(t, freedom) == pytest.approx(p, rel=1e-3)
    t = np.array([0.0, 0.3, -2.0, 50.0])
    np.testing.assert_allclose(
        stats.student_p(t, 1), 1 - 2 * np.arctan(np.abs(t)) / np.pi, rtol=1e-10
    )
    np.testing.assert_allclose(stats.student_p(t, 2), 1 - np.abs(t) / np.sqrt(2 + t**2), rtol=1e-9)
    normal = [math.erfc(x / math.sqrt(2)) for x in (0.5, 2.0, 4.0)]
    np.testing.assert_allclose(
        stats.student_p([0.5, 2.0, 4.0], 1000), normal, rtol=0.1
    )  # off by some t^4 / 4000
    assert stats.student_p(4.0, 3) > 10 * normal[2]  # the twin: few rows need more than the normal


def test_a_student_quantile_is_where_its_tail_begins():
    for tail, freedom in ((0.025, 4), (0.001, 1), (0.2, 2.5), (0.05, 700)):
        assert stats.student_p(stats.student_quantile(tail, freedom), freedom) == pytest.approx(
            2 * tail, rel=1e-9
        )


def test_a_column_without_spread_has_no_z_whatever_rounding_does():
    """The mean of seven times 0.1 is not 0.1: taken around it, a spread would remain, and a z of thousands."""
    assert np.full(7, 0.1).std(ddof=1) > 0  # the twin
    a, b = np.full((7, 1), 0.1), np.full((4, 1), 0.1 + 1e-12)
    assert stats.welch_z(a, b)[0] == 0 and stats.welch_p(a, b)[0] == 1


def test_wilson_is_scipys_for_whole_hits():
    from scipy.stats import binomtest

    for hits, count, level in ((0, 10, 0.95), (3, 10, 0.95), (10, 10, 0.8), (17, 60, 0.99)):
        interval = binomtest(hits, count).proportion_ci(level, method="wilson")
        assert stats.wilson(hits, count, level) == pytest.approx(
            (interval.low, interval.high), abs=1e-12
        )


def test_a_cube_has_its_cells_where_its_levels_say():
    table = pd.DataFrame({"prompt": ["b", "a", "a"], "seed": [1, 0, 1], "score": [3.0, 1.0, 2.0]})
    cube = stats.cube(table, "score", {"prompt": ["b", "a"], "seed": [0, 1]})
    np.testing.assert_array_equal(cube, [[np.nan, 3], [1, 2]])


def test_welch_p_keeps_its_level_for_few_rows():
    """Unequal groups of unequal spread, no difference: about 5 % below 0.05; z against the normal: far more."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, (4, 20_000)), rng.normal(0, 2, (6, 20_000))
    assert abs((stats.welch_p(a, b) <= ALPHA).mean() - ALPHA) < 0.01
    assert (np.abs(stats.welch_z(a, b)) > 1.96).mean() > 1.5 * ALPHA
    assert stats.welch_p(np.ones((3, 1)), np.zeros((3, 1)))[0] == 1


def test_false_discovery_by_hand():
    np.testing.assert_allclose(
        stats.false_discovery([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )
    assert (stats.false_discovery([0.9, 1.0]) <= 1).all()
    found = stats.false_discovery(np.random.default_rng(6).uniform(size=(1000)))
    assert found.min() > 0.01  # where nothing is to be found


def test_a_large_sweep_is_quick():
    x = crossed(np.random.default_rng(18), (16, 12, 8))

    def seconds(job):
        begin = time.perf_counter()
        job()
        return time.perf_counter() - begin

    assert min(seconds(lambda: stats.crossed_bootstrap(x)) for _ in range(5)) < 0.1
    assert min(seconds(lambda: stats.simultaneous_lead(x, 8, apart=2)) for _ in range(5)) < 0.1


HOLE = np.where(np.arange(48).reshape(2, 6, 4) == 33, np.nan, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: stats.crossed_bootstrap(HOLE),
            r"values is nan at window 1, prompt 2, seed 1 \(1 in all\)",
        ),
        (
            lambda: stats.crossed_bootstrap(HOLE * np.inf),
            r"window 0, prompt 0, seed 0 \(48 in all\)",
        ),
        (
            lambda: stats.crossed_bootstrap(np.ones(4)),
            r"shape \(4,\), expected a non-empty \(windows, prompts, seeds\)",
        ),
        (lambda: stats.crossed_bootstrap(np.ones((2, 0, 4))), "non-empty"),
        (
            lambda: stats.crossed_bootstrap(np.ones((2, 6, 4)), level=95),
            "level=95 is not between 0 and 1",
        ),
        (
            lambda: stats.crossed_bootstrap(np.ones((2, 6, 4)), prompts="few"),
            "use 'random', 'fixed' or None",
        ),
        (
            lambda: stats.crossed_bootstrap(np.ones((2, 1, 4)), prompts="random"),
            "one prompt cannot be resampled",
        ),
        (lambda: stats.simultaneous_lead(HOLE, 0), "window 1, prompt 2, seed 1"),
        (lambda: stats.simultaneous_lead(np.ones((6, 4)), 0), "expected a non-empty"),
        (
            lambda: stats.simultaneous_lead(np.ones((3, 6, 4)), 0, apart=3),
            r"at least one rival.*apart=3",
        ),
        (lambda: stats.simultaneous_lead(np.ones((3, 6, 4)), 1, [0, 1]), "cannot be compared"),
        (lambda: stats.simultaneous_lead(np.ones((3, 6, 4)), -1, [0]), "windows 0 to 2"),
        (lambda: stats.simultaneous_lead(np.ones((3, 6, 4)), 0, [3]), "windows 0 to 2"),
        (
            lambda: stats.simultaneous_lead(np.ones((3, 6, 4)), 0, draws=10),
            "draws=10 are fewer than 1 / alpha",
        ),
        (
            lambda: stats.simultaneous_lead(np.ones((3, 6, 4)), 0, alpha=1.5),
            "alpha=1.5 is not between 0 and 1",
        ),
        (
            lambda: stats.any_effect(np.ones((2, 6, 4)), HOLE[1]),
            "placebo is nan at window 0, prompt 2, seed 1",
        ),
        (
            lambda: stats.any_effect(np.ones((2, 6, 4)), np.ones((4, 6))),
            "the same prompts and seeds",
        ),
        (
            lambda: stats.share_interval(np.ones((2, 6, 4)), np.ones((6, 4))),
            "ceiling has shape",
        ),
        (
            lambda: stats.share_interval(np.ones((2, 6, 4)), np.ones((1, 6, 3))),
            r"ceiling has shape \(1, 6, 3\), effects \(2, 6, 4\)",
        ),
        (lambda: stats.clopper_pearson(3, 2), "no share"),
        (lambda: stats.split_seeds([]), "at least one"),
        (lambda: stats.split_seeds([3, 4, 3]), "none twice"),
        (lambda: stats.welch_z(np.ones((1, 3)), np.ones((4, 3))), "at least two rows"),
        (lambda: stats.welch_z(np.ones((4, 3)), np.ones((4, 2))), "same columns"),
        (
            lambda: stats.welch_z(np.full((4, 3), np.nan), np.ones((4, 3))),
            "a is nan at row 0, column 0",
        ),
    ],
)
def test_errors_name_the_place_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
