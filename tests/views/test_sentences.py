"""A sentence compares two things only where an interval says that they differ."""

import re

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from locogen.errors import LocogenError
from locogen.localization.trace_effects import BestState, Sides
from locogen.plan import Window
from locogen.views.editors import describe_editors
from locogen.views.sentences import (
    answer_edit,
    compare_words,
    describe_choice,
    describe_clamping,
    describe_edit,
    describe_erasure,
    describe_side_counts,
    describe_sides,
    describe_steps,
    describe_trace,
)
from locogen.views.tables import describe

COMPARES = re.compile(
    r"\b(better|worse|more|less|largest|most|fewer|enough|lowers|raises|falls|takes|back)\b"
)
NAN = float("nan")
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
    words = describe_trace(total, best)
    assert bool(COMPARES.search(words)) == leaves_out_zero(line)
    # Only of what was taken for sure can something be a share, and of no amount below zero.
    assert ("75 % of it" in words) == (line["low"] > 0)
    assert not re.search(r"takes −|takes 0\.00 \[−", words)


@given(intervals())
def test_a_state_brings_something_back_only_where_the_interval_says_so(line):
    total = pd.DataFrame([{"axis": "ceiling", "concept": "neon"}])
    total = total.assign(estimate=0.4, low=0.3, high=0.5)
    words = describe_trace(total, BestState("MLP", 2, **line, share=0.75, p_value=0.01, reason=""))
    assert ("brings back" in words) == (line["low"] > 0)
    assert ("lowers the score further" in words) == (line["high"] < 0)
    assert ("no clear effect" in words) == (not leaves_out_zero(line))
    unknown = BestState("MLP", 2, **line, share=NAN, p_value=0.01, reason="")
    assert not re.search(r"nan|– of it|%", describe_trace(total, unknown))


def test_a_trace_of_one_seed_brings_nothing_back_for_sure():
    total = pd.DataFrame([{"axis": "ceiling", "concept": "neon"}])
    total = total.assign(estimate=-0.01, low=NAN, high=NAN)
    unclear = "it is not clear that the noise changes the score (−0.010, without an interval)"
    best = BestState("MLP", 2, 0.3, NAN, NAN, share=NAN, p_value=1.0, reason=unclear)
    assert describe_trace(total, best) == (
        f"neon: {unclear}. Clean output of MLP, layer 2, has an effect of 0.30, without an interval."
    )
    total = total.assign(estimate=0.4, low=0.3, high=0.5)
    assert f"without an interval ({unclear})." in describe_trace(total, best), "the twin"


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


def test_what_has_no_interval_is_not_compared():
    rows = [("y", 0.5, 0.1, 0.9), ("x", NAN, NAN, NAN), ("z", 0.5, NAN, NAN)]
    leads = pd.DataFrame(rows, columns=["rival", "estimate", "low", "high"])
    words = "cannot be compared with z (0.50), x (–)"
    assert compare_words(leads[1:]) == words
    assert compare_words(leads) == f"better than y (0.50 [0.10, 0.90]); {words}"


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


@pytest.mark.parametrize(("seeds", "is_few"), [(1, True), (2, True), (4, False), (NAN, False)])
def test_intervals_over_few_seeds_say_what_they_are_worth(seeds, is_few):
    words = describe_edit(means(seeds=seeds), "layers 0-1")
    assert words.endswith("intervals are hardly worth printing.") == is_few
    assert (f"; with n = {seeds} seed" in words) == is_few
    assert describe_edit(means(), "layers 0-1").endswith("100 % before)."), "a table without them"


def test_clamping_says_lost_and_of_a_fact_gained():
    line = {"measure": "concept_score", "neurons": 5, "estimate": 0.4, "low": 0.3, "high": 0.5}
    arms = pd.DataFrame([line | {"arm": arm} for arm in ("top", "random", "edit")])
    assert describe_clamping(arms, 96).startswith("Concept score lost: ")
    of_a_fact = describe_clamping(arms, 96, kind="fact")
    assert of_a_fact.startswith("Score of the new answer gained: ")


HARDLY = "intervals are hardly worth printing"


def _sentences_over(seeds):
    """Every sentence that has intervals over seeds, of tables that say over how many."""
    line = {"estimate": 0.4, "low": 0.3, "high": 0.5, "n_seeds": seeds}
    total = pd.DataFrame([line | {"axis": "ceiling", "concept": "neon"}])
    best = BestState("MLP", 2, 0.3, 0.2, 0.4, share=0.75, p_value=0.01, reason="")
    window = {"concept": "neon", "axis": "layer", "kind": "style", "width": 2, "position": 3}
    effects = pd.DataFrame([line | window | {"share": None}])
    arms = pd.DataFrame([line | {"arm": arm, "neurons": 5} for arm in ("top", "random", "edit")])
    index = pd.MultiIndex.from_tuples([("jointly", 2, "erased")], names=["way", "count", "group"])
    erased = {"mean": 0.0, "low": 0.0, "high": 0.5, "prompts": 3, "n": 3 * seeds}
    shares = pd.DataFrame([erased], index=index)
    own = means(seeds=seeds)
    return {
        "trace": describe_trace(total, best),
        "sweep": describe(effects, Window(3, 2)),
        "sweep without a carrier": describe(effects),
        "sweep without a place": describe(effects, Window(None, 2)),
        "attribution": describe(effects.assign(method="attribution")),
        "clamping": describe_clamping(arms.assign(measure="concept_score"), 96),
        "erasure": describe_erasure(shares, shares["mean"].droplevel("group"), "style"),
        "edit": describe_edit(own, "layers 0-1"),
        "answer": answer_edit(own, "layers 0-1", "neon"),
        "editors": describe_editors(own),
    }


@pytest.mark.parametrize(("seeds", "is_few"), [(1, True), (2, True), (4, False)])
def test_every_sentence_over_few_seeds_says_what_its_intervals_are_worth(seeds, is_few):
    count = "1 seed" if seeds == 1 else f"{seeds} seeds"
    for name, words in _sentences_over(seeds).items():
        assert words.endswith(f"; with n = {count}, {HARDLY}.") == is_few, name
        assert words.count(HARDLY) == is_few and words.endswith("."), name


def test_counts_are_whole_where_a_table_turned_them_into_floats():
    line = means(units=1.0)
    assert "46 %, n = 1; 100 % before" in describe_edit(line, "layers 0-1")
    answer = answer_edit(line, "layers 0-1", "neon")
    assert "pictures of 1 prompt: in at most 46 % of such prompts" in answer
    assert "pictures of 6 prompts: in" in answer_edit(means(), "layers 0-1", "neon"), "the twin"


def test_an_edit_without_shares_of_right_pictures_says_so():
    words = describe_edit(means(quantity="score"), "layers 0-1")
    assert words.startswith("With the edit at layers 0-1, nothing is known of what the pictures")
    assert " for ." not in words


def test_what_the_model_never_showed_is_not_gone():
    words = answer_edit(means(before=0.0), "layers 0-1", "neon")
    assert words.startswith("Is neon gone? Nothing can be said: the model without the edit shows")
    assert "of 6 prompts either" in words and "nobody tried" not in words
    seldom = answer_edit(means(before=0.2), "layers 0-1", "neon")
    assert "Nothing can be said" not in seldom and "95 % confidence; 20 % before;" in seldom
    # A new answer is one that the model did not give before.
    for before, is_open in ((0.0, False), (0.5, False), (1.0, True)):
        words = answer_edit(means(sign=1, before=before, after=1.0), "layers 0-1", "france")
        assert ("Nothing can be said" in words) == is_open


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
        words = describe_erasure(shares.assign(prompts=6, n=24), likeness, "style")
        assert "25 % (10 % to 50 %, n = 6 prompts × 4 seeds)" in words


def test_one_style_is_erased_and_its_likeness_may_be_unknown():
    index = pd.MultiIndex.from_tuples([("jointly", 1, "erased")], names=["way", "count", "group"])
    shares = pd.DataFrame({"mean": [-0.0], "low": [0.0], "high": [0.5], "prompts": 1}, index=index)
    likeness = pd.Series([-0.001], shares.index.droplevel("group"))
    words = describe_erasure(shares, likeness, "style")
    assert words.startswith("After erasing 1 style: jointly, 0 % (0 % to 50 %, n = 1 prompt)")
    assert words.endswith("ordinary SSIM 0.00.")
    assert describe_erasure(shares, likeness * NAN, "style").endswith("ordinary SSIM –.")


def test_steps_of_nothing():
    assert describe_steps({}, 50, 0.9) == (50, "no fewer steps than 50 were tried.")
    fewest, words = describe_steps({4: NAN, 20: 0.95}, 50, 0.9)
    assert fewest == 20
    assert "an unknown share of the best effect with 4, 95 % with 20." in words


def test_steps_say_that_their_shares_have_no_intervals_and_what_they_are_of():
    doubt = "These are ratios of means over 3 seeds of 1 concept, without intervals."
    known = describe_steps({4: 0.95}, 50, 0.9, concepts=1, seeds=3)[1]
    assert known.endswith(f"95 % of the best effect with 4. {doubt}")
    unknown = describe_steps({4: 0.95}, 50, 0.9)[1]
    assert unknown.endswith("with 4. These are ratios of means, without intervals.")


def test_the_best_of_several_tries_is_not_praised():
    """Its score on the prompts that chose it stands beside the number of tries."""
    words = describe_choice("neon", "λ = 0.01", 0.95, 96, "OUTCOME")
    assert "the largest score of 96 settings on other prompts (0.95, without an interval" in words
    assert "looks better than it is" in words and words.endswith("chose nothing: OUTCOME")
    one = describe_choice("neon", "λ = 0.01", 0.95, 1, "OUTCOME")
    assert "the one setting that was tried" in one and "largest" not in one, "the twin"


def test_sides_are_counted_by_kind():
    rows = [("told fact", "text encoder")] * 2 + [("style", "denoiser"), ("style", "cannot tell")]
    words = describe_side_counts(pd.DataFrame(rows, columns=["kind", "side"]))
    assert "told fact: text encoder for 2 of 2 [34 %, 100 %]; style: denoiser for 1 of 2" in words
    assert words.endswith("cannot tell for 1 of 2 [9 %, 91 %].")


@given(intervals())
def test_neighbors_changed_only_where_the_interval_says_so(line):
    known = means(
        measure="specificity", change=line["estimate"], low=line["low"], high=line["high"]
    )
    both = pd.concat([means(), known])
    words = describe_edit(both, "layers 0-1")
    assert ("a change of" in words) == leaves_out_zero(line)
    assert ("no clear change" in words) != leaves_out_zero(line)


def test_a_change_without_an_interval_is_not_judged():
    near = means(measure="specificity", before=0.96, after=0.88, change=-0.08)
    for low, high, words in (
        (NAN, NAN, "96 % before)."),
        (-0.15, 0.02, "96 % before, no clear change: −8 [−15, 2] points)."),
        (-0.15, -0.02, "96 % before, a change of −8 [−15, −2] points)."),
    ):
        both = pd.concat([means(), near.assign(low=low, high=high)])
        assert describe_edit(both, "layers 0-1").endswith(words)


def test_a_share_that_is_unknown_is_not_too_small():
    fewest, words = describe_steps({12: NAN, 20: NAN}, 50, 0.9)
    assert fewest == 50 and "no fewer" not in words
    assert words.startswith(
        "whether 20 steps are enough for 90 % of what 50 choose, in every concept, could not be "
        "judged: at least an unknown share"
    )
    fewest, words = describe_steps({1: NAN, 12: 0.95}, 50, 0.9)
    assert fewest == 12 and "12 steps are enough" in words
    assert "(of 1 step it could not be judged)" in words
    # The twin: a share that is known, and too small, is no question.
    assert "judged" not in describe_steps({4: NAN, 12: 0.5, 20: 0.95}, 50, 0.9)[1]
    assert "no fewer than 50" in describe_steps({4: NAN, 12: 0.5}, 50, 0.9)[1]


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
