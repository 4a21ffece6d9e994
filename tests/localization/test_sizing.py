"""`plan_seeds`: as many seeds as it says give the interval it promised, as often as it says."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_localization import planted

from locogen.errors import LocogenError
from locogen.localization import spread as sizing
from locogen.localization.sample_size import plan_seeds
from locogen.localization.spread import Spread, seeds_needed
from locogen.stats import crossed_bootstrap


def two_way(dice, prompts, seeds, by_prompt, by_seed, rest):
    own, luck = (
        by_prompt * dice.standard_normal((prompts, 1)),
        by_seed * dice.standard_normal((1, seeds)),
    )
    return 0.3 + own + luck + rest * dice.standard_normal((prompts, seeds))


def kept(dice, *, prompts, pilot, spread, interval, repeats=150, plan=None):
    """How often the interval of a run with the planned seeds is as narrow as promised, and the seeds planned."""
    hits, planned = 0, []
    for _ in range(repeats):
        first = two_way(dice, prompts, pilot, *spread)
        seeds = plan(first, interval) if plan else seeds_needed(first, interval, 0.95, 0.8)[0]
        planned.append(seeds)
        again = two_way(dice, prompts, seeds, *spread)
        hits += Spread(again, prompts >= 6).half_width(seeds, 0.95) <= interval
    return hits / repeats, float(np.median(planned))


def plain(values, interval):
    """The twin: the pilot's variance taken for the truth, and 1.96."""
    return max(2, math.ceil((1.96 / interval) ** 2 * values.mean(0).var(ddof=1)))


CASES: list[dict[str, Any]] = [
    dict(prompts=2, pilot=8, spread=(0.05, 0.03, 0.05), interval=0.02),
    dict(prompts=4, pilot=12, spread=(0.05, 0.02, 0.05), interval=0.012),
    dict(prompts=8, pilot=8, spread=(0.01, 0.08, 0.05), interval=0.05),
]


@pytest.mark.parametrize("case", CASES)
def test_the_promise_is_kept_as_often_as_said(case):
    """80 % of runs, less 3 standard errors of 150 repeats."""
    share, seeds = kept(np.random.default_rng(3), **case)
    assert share >= 0.8 - 3 * math.sqrt(0.8 * 0.2 / 150)
    assert share <= 0.97, "and not for a waste of pictures"
    assert 2 <= seeds < 200


def test_a_pilots_variance_taken_for_the_truth_breaks_the_promise():
    share, _ = kept(np.random.default_rng(3), **CASES[0], plan=plain)
    assert share < 0.6


def test_widths_are_those_of_the_effects_table():
    values = two_way(np.random.default_rng(0), 8, 12, 0.05, 0.05, 0.05)
    found = crossed_bootstrap(values[None], draws=20000)
    half = float(found.high[0] - found.low[0]) / 2
    assert Spread(values, True).half_width(12, 0.95) == pytest.approx(half, rel=0.06)


def test_where_prompts_differ_too_much_no_number_of_seeds_will_do():
    values = two_way(np.random.default_rng(0), 8, 8, 0.2, 0.01, 0.01)
    seeds, now, limit = seeds_needed(values, 0.01, 0.95, 0.8)
    assert seeds is None and 0.01 < limit <= now


def test_plan_seeds_reads_a_run():
    table = planted({5: 0.4}, prompts=2, seeds=6, noise=0.03)
    (line,) = plan_seeds(SimpleNamespace(table=table), 0.01).to_dict("records")  # pyright: ignore[reportArgumentType]
    assert line["position"] == 5 and line["seeds_now"] == 6 and line["prompts"] == 2
    assert line["half_width"] > 0.01 and line["seeds"] > 6 and line["pictures"] == 4 * line["seeds"]
    (wide,) = plan_seeds(SimpleNamespace(table=table), 0.2).to_dict("records")  # pyright: ignore[reportArgumentType]
    assert wide["seeds"] <= 6


def test_what_it_refuses():
    for options in ({"interval": 0}, {"level": 1}, {"assurance": 0}):
        with pytest.raises(LocogenError, match="positive width"):
            plan_seeds(SimpleNamespace(table=None), **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LocogenError, match="one seed"):
        seeds_needed(np.zeros((2, 1)), 0.01, 0.95, 0.8)
    assert sizing.MOST >= 1000
