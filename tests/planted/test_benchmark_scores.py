"""Answers made by hand against a truth made by hand: each measure says what it should, and can say the opposite."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from locogen.benchmarks import subjects
from locogen.benchmarks.answers import KINDS, Answer, answer_of, by_layer
from locogen.benchmarks.faithfulness import (
    circuit_distance,
    circuit_performance,
    circuit_plan,
    faithfulness,
)
from locogen.benchmarks.localizers import constant_place
from locogen.benchmarks.scores import (
    MEASURES,
    auroc,
    costs,
    kinds_answered,
    measures,
    places_of,
    places_text,
    scores,
    share_at,
)
from locogen.benchmarks.subjects import DEAF, Truth, plants_to_ask, truth_of, weightless
from locogen.catalog.plants import Plant, Planting, plant_entry
from locogen.errors import LocogenError
from locogen.plan import Concept, PromptPair, Verdict, Window
from locogen.planting import admission

LAYERS = 16
EARLY, LATE = Window(0, 2), Window(12, 2)
ONE = Truth("one place", (LATE,))
EITHER = Truth("each sufficient", (EARLY, LATE))
BOTH = Truth("each necessary", (EARLY, LATE))
WIDE = Truth("spread", (Window(8, 6),))
NOBODY = Truth("nobody")
TRUTHS = (ONE, EITHER, BOTH, WIDE, NOBODY)


def perfect(truth: Truth) -> dict[str, float]:
    """The measures of the right answer, with planted layers ranked first and right intervals."""
    profile = np.array([float(layer in truth.layers) for layer in range(LAYERS)])
    effects = [
        {"position": i, "low": value - 0.1, "high": value + 0.1} for i, value in enumerate(profile)
    ]
    circuit = dict.fromkeys((1, 2, 4, 8, 16), 1.0) | {0: 0.0}
    return measures(
        truth, truth.kind, truth.places, profile=profile, effects=effects, circuit=circuit
    )


def values_of(answers: dict[str, tuple[str, tuple[Window, ...]]], truth: Truth, name: str):
    return {who: measures(truth, *answer)[name] for who, answer in answers.items()}


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.kind)
def test_the_right_answer_scores_full_marks(truth: Truth):
    values = perfect(truth)
    assert values["right_kind"] == 1
    assert values["coverage"] == values["coverage_near"] == 1
    for name in ("hit", "complete", "auroc"):
        assert values[name] == 1 or math.isnan(values[name])
    for name in ("off_by_one", "elsewhere", "false_single", "inconclusive"):
        assert values[name] == 0 or math.isnan(values[name])
    # Where it applies at all.
    assert math.isnan(values["hit"]) == (truth.kind in ("spread", "nobody"))
    assert math.isnan(values["auroc"]) == (truth.kind == "nobody")


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.kind)
def test_always_abstaining_is_never_wrong_and_never_right(truth: Truth):
    values = measures(truth, "inconclusive", ())
    assert values["inconclusive"] == 1 and values["right_kind"] == 0
    for name in ("hit", "off_by_one", "elsewhere", "complete", "false_single"):
        assert values[name] == 0 or math.isnan(values[name])
    # What it holds to be open names nothing.
    assert measures(ONE, "inconclusive", (LATE,))["hit"] == 0


def test_a_constant_answer_hits_where_it_happens_to_be_right_and_names_falsely_elsewhere():
    constant = ("one place", (LATE,))
    assert measures(ONE, *constant)["hit"] == 1
    assert measures(Truth("one place", (EARLY,)), *constant)["hit"] == 0
    assert measures(Truth("one place", (EARLY,)), *constant)["elsewhere"] == 1
    for truth in (EITHER, WIDE, NOBODY):
        assert measures(truth, *constant)["false_single"] == 1
    assert math.isnan(measures(ONE, *constant)["false_single"])
    assert math.isnan(measures(BOTH, *constant)["false_single"])


def test_a_hit_shares_a_layer_and_nothing_is_apart():
    answers = {
        "overlap": ("one place", (Window(13, 2),)),
        "next to it": ("one place", (Window(14, 2),)),
        "two away": ("one place", (Window(15, 1),)),
        "one right, one apart": ("each necessary", (LATE, EARLY)),
        "none": ("nobody", ()),
    }
    assert values_of(answers, ONE, "hit") == {
        "overlap": 1,
        "next to it": 0,
        "two away": 0,
        "one right, one apart": 0,
        "none": 0,
    }
    assert values_of(answers, ONE, "off_by_one") == {
        "overlap": 0,
        "next to it": 1,
        "two away": 0,
        "one right, one apart": 0,
        "none": 0,
    }
    assert values_of(answers, ONE, "elsewhere")["one right, one apart"] == 1
    assert values_of(answers, ONE, "elsewhere")["none"] == 0


def test_of_two_places_one_is_a_hit_and_not_complete():
    half = measures(BOTH, "one place", (EARLY,))
    assert (half["hit"], half["complete"]) == (1, 0)
    whole = measures(BOTH, "each necessary", (EARLY, LATE))
    assert (whole["hit"], whole["complete"]) == (1, 1)


def test_the_side_counts_only_for_localizers_that_ask():
    fact = Truth("", side="denoiser")
    assert measures(fact, "inconclusive", (), side="denoiser")["right_side"] == 1
    assert measures(fact, "inconclusive", (), side="text encoder")["wrong_side"] == 1
    cannot_tell = measures(fact, "inconclusive", (), side="")
    assert (cannot_tell["right_side"], cannot_tell["wrong_side"]) == (0, 0)
    assert math.isnan(measures(fact, "inconclusive", ())["right_side"])
    assert math.isnan(measures(ONE, "one place", (LATE,), side="denoiser")["right_side"])


def test_a_plant_that_was_not_admitted_scores_nothing():
    unknown = dataclasses.replace(ONE, scored=False)
    assert all(math.isnan(value) for value in perfect(unknown).values())
    assert not all(math.isnan(value) for value in perfect(ONE).values())


def test_a_share_leaves_the_kind_open_and_keeps_the_ranking_of_pictures():
    half = Truth("", (LATE,), strength=0.5)
    values = perfect(half)
    for name in ("right_kind", "hit", "coverage", "auroc"):
        assert math.isnan(values[name])
    assert values["cpr"] > 0.9


# --- ranks ---------------------------------------------------------------------------------------


def test_auroc_against_scipy_and_its_ends():
    from scipy.stats import mannwhitneyu

    profile = np.random.default_rng(0).normal(size=LAYERS).round(1)  # with ties
    planted = {3, 4, 9}
    others = [i for i in range(LAYERS) if i not in planted]
    expected = mannwhitneyu(profile[sorted(planted)], profile[others]).statistic / (3 * 13)
    assert auroc(profile, planted) == pytest.approx(expected)
    assert auroc(np.zeros(LAYERS), planted) == 0.5
    inside = np.array([float(i in planted) for i in range(LAYERS)])
    assert (auroc(inside, planted), auroc(-inside, planted)) == (1, 0)
    assert math.isnan(auroc(profile, range(LAYERS)))


def test_windows_become_layers_by_their_mean():
    profile = np.array([0.0, 2.0, 4.0])[:, None, None] * np.ones((3, 2, 5))
    np.testing.assert_allclose(by_layer(profile, 2), [0, 1, 3, 4])
    np.testing.assert_allclose(by_layer(profile, 1), [0, 2, 4])


CONCEPT = Concept("cat", "object", (PromptPair("a big cat b", "a big b"),))


def test_the_best_layers_get_the_prompt_and_the_rest_the_target():
    profile = np.array([float(i in (12, 13)) for i in range(LAYERS)])
    plan, counts = circuit_plan(CONCEPT, profile, [0, 1])
    assert counts == [0, 0, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    by_count = dict(zip(counts, plan, strict=True))
    assert by_count[0].layers == tuple(range(LAYERS))  # the ceiling
    assert by_count[2].layers == tuple(i for i in range(LAYERS) if i not in (12, 13))
    assert by_count[16].is_plain  # the baseline


def test_cpr_and_cmd_of_the_best_and_of_the_worst_ranking():
    # Score 0.9 with the concept, 0.4 without; layers 12 and 13 bring half of it each.
    best = {0: 0.4, 1: 0.65, 2: 0.9, 4: 0.9, 8: 0.9, 16: 0.9}
    worst = {0: 0.4, 1: 0.4, 2: 0.4, 4: 0.4, 8: 0.4, 16: 0.9}
    good, bad = faithfulness(best, 0.05), faithfulness(worst, 0.05)
    assert good == pytest.approx({0: 0, 1: 0.5, 2: 1, 4: 1, 8: 1, 16: 1})
    assert circuit_performance(good) == pytest.approx((0.25 + 0.75 + 14) / 16)
    assert circuit_performance(bad) == pytest.approx(4 / 16)
    assert circuit_distance(good) == pytest.approx(1 / 16)
    assert circuit_distance(bad) == pytest.approx(12 / 16)
    # A fact's score rises towards the ceiling: the same curve.
    mirrored = {count: 1 - score for count, score in best.items()}
    assert faithfulness(mirrored, 0.05) == pytest.approx(good)


def test_more_than_all_counts_for_cpr_and_against_cmd():
    exact = faithfulness({0: 0.0, 1: 1.0, 2: 1.0}, 0.05)
    beyond = faithfulness({0: 0.0, 1: 1.5, 2: 1.0}, 0.05)
    assert circuit_performance(beyond) > circuit_performance(exact)
    assert circuit_distance(beyond) > circuit_distance(exact)


def test_no_ratio_where_the_target_changes_nothing():
    flat = faithfulness({0: 0.5, 1: 0.6, 2: 0.51}, 0.05)
    assert flat == {} and math.isnan(circuit_performance(flat))


# --- intervals -----------------------------------------------------------------------------------


def effects(low: float, high: float) -> list[dict[str, float | None]]:
    return [{"position": i, "low": low, "high": high} for i in range(LAYERS - 1)]


def test_coverage_counts_intervals_outside_the_plant_alone():
    inside = [11, 12, 13]
    lines = effects(-0.1, 0.1)
    for start in inside:
        lines[start] |= {"low": 0.5, "high": 0.7}
    assert measures(ONE, "one place", (LATE,), effects=lines, width=2)["coverage"] == 1
    # The same under a plant elsewhere: three intervals of twelve are wrong.
    other = Truth("one place", (EARLY,))
    coverage = measures(other, "one place", (LATE,), effects=lines, width=2)["coverage"]
    assert coverage == pytest.approx(10 / 13)


def test_an_interval_near_zero_is_not_one_that_holds_it():
    values = measures(NOBODY, "nobody", (), effects=effects(0.01, 0.1), width=2)
    assert (values["coverage"], values["coverage_near"]) == (0, 1)
    assert measures(NOBODY, "nobody", (), effects=effects(0.03, 0.1), width=2)["coverage_near"] == 0
    # Without intervals there is nothing to cover.
    without = [{"position": 0, "low": None, "high": None}]
    assert math.isnan(measures(NOBODY, "nobody", (), effects=without)["coverage"])


def test_the_share_is_that_of_the_window_on_the_planted_place():
    lines = [
        {"position": start, "share": share, "share_low": share - 0.1, "share_high": None}
        for start, share in ((10, 0.9), (11, 0.8), (12, 0.6), (13, 0.7))
    ]
    at = share_at(ONE, lines, 2)
    assert at["share"] == 0.6 and at["share_low"] == pytest.approx(0.5)
    assert math.isnan(at["share_high"] or 0)
    # Single layers: the largest within the place.
    assert share_at(ONE, lines, 1)["share"] == 0.7
    assert share_at(NOBODY, lines, 2)["share"] is None


# --- tables --------------------------------------------------------------------------------------


def table(hits: dict[str, list[float]], localizer: str = "mine") -> pd.DataFrame:
    """{plant: a hit for each concept} as rows of a benchmark's table."""
    rows = []
    for plant, values in hits.items():
        for i, value in enumerate(values):
            row = {"localizer": localizer, "plant": plant, "concept": f"c{i}", "rule": "one place"}
            row |= {"window": 2, "guidance_scale": 7.5, "prompts": 2, "seeds": 4}
            row |= dict.fromkeys(MEASURES, math.nan)
            row |= {"hit": value, "auroc": value, "scored": True, "truth": "one place"}
            row |= {"kind": "one place", "pictures": 10, "rows": 100, "calls": 2, "seconds": 3.0}
            rows.append(row | {"fresh": i == 0})
    return pd.DataFrame(rows)


def line(scored: pd.DataFrame, measure: str) -> pd.Series:
    return scored.set_index("measure").loc[measure]


def test_plants_are_the_unit_of_the_interval():
    few = line(scores(table({"a": [1] * 10, "b": [0] * 10})), "hit")
    many = line(scores(table({f"p{i}": [float(i % 2)] for i in range(20)})), "hit")
    assert few["value"] == many["value"] == 0.5
    assert (few["plants"], few["cells"]) == (2, 20)
    # As many answers, but of two models only: the interval is much wider.
    assert few["high"] - few["low"] > 1.5 * (many["high"] - many["low"])


def test_a_plant_with_more_concepts_counts_no_more():
    scored = line(scores(table({"a": [1] * 9, "b": [0]})), "hit")
    assert scored["value"] == 0.5


def test_full_marks_still_have_an_interval():
    scored = scores(table({"a": [1], "b": [1], "c": [1]}))
    assert line(scored, "hit")["low"] < 0.5 and line(scored, "hit")["high"] == 1
    # Student's interval of equal values has no width: it says so by its ends.
    assert line(scored, "auroc")["low"] == line(scored, "auroc")["high"] == 1


def test_the_means_interval_covers_at_its_rate(monkeypatch):
    alone = {"auroc": MEASURES["auroc"]}  # the others would take most of the time
    monkeypatch.setattr("locogen.benchmarks.scores.MEASURES", alone)
    dice = np.random.default_rng(0)
    holds = []
    for _ in range(400):
        values = dice.normal(0.5, 0.1, 6)
        scored = line(scores(table({f"p{i}": [value] for i, value in enumerate(values)})), "auroc")
        holds.append(scored["low"] <= 0.5 <= scored["high"])
    assert 0.92 <= np.mean(holds) <= 0.98


def test_measures_that_apply_nowhere_have_no_line():
    scored = scores(table({"a": [1]}))
    assert set(scored["measure"]) == {"hit", "auroc"}


def test_scores_by_rule_and_kinds_and_costs():
    both = pd.concat([table({"a": [1, 1]}), table({"a": [0, 0]}, "other")])
    by_rule = scores(both, by=("rule",))
    assert set(by_rule["rule"]) == {"one place"} and set(by_rule["localizer"]) == {"mine", "other"}
    assert kinds_answered(both).loc[("mine", "one place"), "one place"] == 2
    paid = costs(both).set_index("localizer")
    assert (paid.loc["mine", "rows"], paid.loc["mine", "timed"]) == (100, 1)


def test_places_are_written_and_read_back():
    assert places_of(places_text((EARLY, Window(13, 1)))) == (EARLY, Window(13, 1))
    assert places_of("") == ()


# --- answers and truths --------------------------------------------------------------------------


def test_a_window_is_one_place_and_none_is_inconclusive():
    found = answer_of(Window(12, 2, "ahead"))
    assert (found.kind, found.places, found.reason) == ("one place", (LATE,), "ahead")
    none = answer_of(Window(None, 2, "no effect"))
    assert (none.kind, none.places) == ("inconclusive", ())


def test_a_verdict_keeps_its_kind_and_places():
    found = answer_of(Verdict(None, 2, "why", kind="each sufficient", places=(EARLY, LATE)))
    assert (found.kind, found.places) == ("each sufficient", (EARLY, LATE))


@pytest.mark.parametrize(
    "kind, places, profile, says",
    [
        ("here", (), None, "here"),
        ("one place", (), None, "0 places"),
        ("nobody", (), [1.0, math.nan], "not a finite number"),
    ],
)
def test_an_answer_is_checked(kind, places, profile, says):
    with pytest.raises(LocogenError, match=says):
        Answer(kind, places, profile)
    assert Answer("nobody", profile=np.ones(3)).kind in KINDS


def plant(rule: str, figures: dict | None, share: float = 1.0) -> Plant:
    measured = {} if figures is None else {"admitted": True, "figures": {"style": figures}}
    planting = Planting(rule, () if rule == "nobody" else (LATE,), share)
    return Plant("x", "mini", "tune", "denoiser", {"style": planting}, (), 5, 0, admission=measured)


def test_the_truth_is_what_admission_has_measured():
    admitted = truth_of(plant("one place", {"admitted": True, "of_base": 0.9}), "style")
    assert (admitted.kind, admitted.places, admitted.scored) == ("one place", (LATE,), True)
    refused = truth_of(plant("one place", {"admitted": False, "of_base": 0.9}), "style")
    assert not refused.scored and refused.note == "not admitted"
    unlearned = truth_of(plant("one place", {"admitted": False, "of_base": 0.01}), "style")
    assert (unlearned.kind, unlearned.places, unlearned.scored) == ("nobody", (), True)
    assert truth_of(plant("one place", None), "style").note == "not measured"
    share = truth_of(plant("one place", {"admitted": True}, share=0.3), "style")
    assert (share.kind, share.strength) == ("", 0.3)


def test_nobody_is_read_at_admissions_own_bound():
    assert subjects.UNREAD == admission.UNREAD


def test_facts_have_a_side():
    truth = truth_of(plant_entry("fact-in-text-a"), "fact")
    assert (truth.kind, truth.places, truth.side) == ("", (), "text encoder")


def test_plants_are_chosen_by_set_and_by_name():
    report = plants_to_ask("report")
    assert {plant.set for plant in report} == {"report"}
    assert not {plant.name for plant in report} & {plant.name for plant in plants_to_ask("tune")}
    names = [plant.name for plant in plants_to_ask(["planted/style-at-0-1", DEAF[0]])]
    assert names == ["style-at-0-1", DEAF[0].name]
    # Of a set, a model without weights is left out; by its name it is not.
    absent = set(weightless())
    assert not {plant.name for plant in plants_to_ask(None)} & absent
    assert {plant.name for plant in plants_to_ask(sorted(absent) or [DEAF[0]])} >= absent
    with pytest.raises(LocogenError, match="style-at-0-1"):
        plants_to_ask(["style-at-0-2"])


def test_plants_are_also_named_in_one_text():
    text = " planted/style-at-0-1, deaf-in-mini"
    assert [plant.name for plant in plants_to_ask(text)] == ["style-at-0-1", "deaf-in-mini"]
    assert plants_to_ask(" tune") == plants_to_ask("tune")
    with pytest.raises(LocogenError, match="no name 'tune'"):
        plants_to_ask("tune, deaf-in-mini")


def test_the_constant_answer_is_chosen_on_the_plants_for_tuning():
    # Three of their five single places are layers 12-13.
    assert constant_place(LAYERS, 2) == LATE
    assert set(LATE) <= set(constant_place(LAYERS, 3))
