"""A sentence compares two things only where an interval says that they differ."""

import re

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from locogen.errors import LocogenError
from locogen.localization.trace_effects import BestState, Sides
from locogen.plan import Window
from locogen.views.sentences import (
    compare_words,
    describe_edit,
    describe_erasure,
    describe_sides,
    describe_steps,
    describe_trace,
)
from locogen.views.tables import describe

COMPARES = re.compile(r"\b(better|worse|lowers|raises|takes)\b")
sizes = st.floats(-2, 2, allow_nan=False)


@st.composite
def intervals(draw):
    """An estimate within its interval."""
    low, estimate, high = sorted(draw(st.tuples(sizes, sizes, sizes)))
    return {"estimate": estimate, "low": low, "high": high}


def leaves_out_zero(line):
    return line["low"] > 0 or line["high"] < 0


@given(intervals())
def test_a_rival_is_beaten_only_where_the_interval_says_so(line):
    words = compare_words(pd.DataFrame([line | {"rival": "all layers"}]))
    assert bool(COMPARES.search(words)) == leaves_out_zero(line)
    assert ("no clear difference" in words) != leaves_out_zero(line)
    assert ("better" in words) == (line["low"] > 0)


@given(intervals())
def test_a_window_moves_the_score_only_where_the_interval_says_so(line):
    row = {"concept": "neon", "axis": "layer", "kind": "style", "width": 2, "position": 3}
    words = describe(pd.DataFrame([row | line | {"share": None}]), Window(3, 2))
    assert bool(COMPARES.search(words)) == leaves_out_zero(line)


def test_a_window_without_an_interval_moves_nothing_for_sure():
    row = {"concept": "neon", "axis": "layer", "kind": "style", "width": 2, "position": 3}
    row |= {"estimate": 0.87, "low": None, "high": None, "share": 1.0}
    words = describe(pd.DataFrame([row]), Window(3, 2))
    assert "has an effect of 0.87, without an interval" in words
    assert not COMPARES.search(words)


@given(intervals())
def test_noise_takes_something_only_where_the_interval_says_so(line):
    total = pd.DataFrame([{"axis": "ceiling", "concept": "neon"} | line])
    best = BestState("MLP", 2, 0.3, 0.2, 0.4, share=0.75, p_value=0.01, reason="")
    assert bool(COMPARES.search(describe_trace(total, best))) == leaves_out_zero(line)


@given(intervals())
def test_minus_signs_are_true_ones_and_less_is_not_minus_more(line):
    names = {"lead": line["estimate"], "low": line["low"], "high": line["high"]}
    words = describe_sides(Sides("layer 1", "MLP 3", **names))
    assert not re.search(r"-\d|back −", words)
    assert bool(re.search(r"\b(more|less)\b", words)) == leaves_out_zero(line)
    assert ("No clear difference" in words) != leaves_out_zero(line)


def test_what_looked_better_by_its_mean_alone_is_no_clear_difference():
    """The case that was printed as "more than the best control"."""
    leads = pd.DataFrame([{"rival": "all layers", "estimate": 0.12, "low": -0.48, "high": 0.81}])
    assert compare_words(leads) == "no clear difference from all layers (0.12 [−0.48, 0.81])"


def means(**changes):
    line = {"arm": "layers 0-1", "measure": "efficacy", "quantity": "right", "units": 6}
    line |= {"before": 1.0, "after": 0.0, "after_low": 0.0, "after_high": 0.459}
    return pd.DataFrame([line | changes])


def test_no_share_without_its_bound_and_count():
    words = describe_edit(means(), "layers 0-1")
    assert "0 % of its own prompts (0 % to 46 %, n = 6; 100 % before)" in words
    assert "telling concept" not in words  # nothing was compared
    near = means(measure="specificity", before=0.9, after=0.88, after_low=0.7, after_high=0.95)
    both = pd.concat([means(), near, means(arm="all layers", after=0.5)])
    words = describe_edit(both, "layers 0-1")
    assert "88 % of its neighbors (70 % to 95 %, n = 6; 90 % before)" in words
    assert "50 %" not in words


def test_many_rivals_are_counted_the_nearest_first():
    lines = [
        {"rival": f"layers {i}-{i + 1}", "estimate": i, "low": i - 0.5, "high": i + 0.5}
        for i in range(6, 0, -1)
    ]
    words = compare_words(pd.DataFrame(lines))
    assert words.startswith("better than layers 1-2 (1.00 [0.50, 1.50]), layers 2-3")
    assert words.endswith("and 3 more")


@pytest.mark.parametrize("has_bounds", [False, True])
def test_shares_of_erased_concepts_have_bounds_where_the_table_has(has_bounds):
    index = pd.MultiIndex.from_tuples([("jointly", 2, "erased")], names=["way", "count", "group"])
    shares = pd.DataFrame({"mean": [0.25], "low": [0.1], "high": [0.5]}, index=index)
    likeness = shares["mean"].droplevel("group")
    words = describe_erasure(shares if has_bounds else shares[["mean"]], likeness, "style")
    assert ("25 % (10 % to 50 %) of their pictures" in words) == has_bounds
    if has_bounds:
        words = describe_erasure(shares.assign(prompts=6), likeness, "style")
        assert "25 % (10 % to 50 %, n = 6 prompts)" in words


def test_steps_say_what_they_reach():
    fewest, words = describe_steps({6: 0.5, 12: 0.97}, 50, 0.9)
    assert fewest == 12 and words.startswith("12 steps are enough for 90 % of what 50 choose")
    assert describe_steps({1: 0.97}, 50, 0.9)[1].startswith("1 step is enough for")
    fewest, words = describe_steps({6: 0.5, 12: 0.7}, 50, 0.9)
    assert fewest == 50 and words.startswith("no fewer than 50 steps are enough")


def test_an_edit_is_described_by_its_own_arm_and_comparison():
    with pytest.raises(LocogenError, match="no arm 'nope': it has layers 0-1"):
        describe_edit(means(), "nope")
    leads = pd.DataFrame([{"rival": "layers 0-1", "estimate": 0.5, "low": 0.1, "high": 0.9}])
    with pytest.raises(LocogenError, match="of another arm"):
        describe_edit(means(), "layers 0-1", leads)


def test_windows_that_nobody_looked_at_are_counted_and_not_described():
    row = {"concept": "neon", "axis": "layer", "kind": "style", "width": 2, "share": None}
    seen = row | {"position": 3, "estimate": 0.4, "low": 0.3, "high": 0.5, "n": 8}
    unseen = row | {"position": 9, "estimate": None, "low": None, "high": None, "n": 0}
    table = pd.DataFrame([seen, unseen])
    assert "1 of 2 windows were not looked at" in describe(table, Window(3, 2))
    assert "not looked at" not in describe(table[:1], Window(3, 2))
    with pytest.raises(LocogenError, match="was not looked at"):
        describe(table, Window(9, 2))
