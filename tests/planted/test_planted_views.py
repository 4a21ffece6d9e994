"""What is drawn and written of a benchmark: the tables behind the plots, and the plots."""

import math

import pandas as pd
import pytest

import locogen as loco
from locogen.benchmarks.scores import MEASURES
from locogen.errors import LocogenError
from locogen.views.planted import HEADINGS, PLANTED, named_layers, share_points

SETTING = {"window": 2, "guidance_scale": 7.5, "prompts": 2, "seeds": 4}


def answer(localizer: str, kind: str, places: str, **more) -> dict:
    row = {"plant": "late", "rule": "one place", "planted": "12-13", "concept": "neon"}
    row |= {"localizer": localizer, "kind": kind, "places": places, "n_layers": 16}
    row |= {"strength": 0.5, "scored": True, "share": None, "share_low": None, "share_high": None}
    return row | SETTING | more


TABLE = pd.DataFrame(
    [
        answer("mine", "one place", "12-13", share=0.4, share_low=0.3, share_high=0.6),
        answer("other", "each necessary", "0-1, 13"),
        answer("third", "inconclusive", "12-13"),
    ]
)


def test_every_measure_has_a_heading():
    assert set(HEADINGS) == set(MEASURES)


def test_named_places_are_those_of_answers_that_name():
    layers = named_layers(TABLE)
    named = layers[["localizer", "first", "last"]].fillna(-1).to_numpy().tolist()
    assert named == [["mine", 12, 13], ["other", 0, 1], ["other", 13, 13], ["third", -1, -1]]
    assert set(layers["planted"]) == {(12, 13)}


def test_the_plot_has_a_panel_for_each_model_and_a_bar_for_each_place():
    two = pd.concat([TABLE, TABLE.assign(plant="early", planted="0-1")])
    figure = loco.plot_places(two)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["late", "early"]
    from matplotlib.colors import to_rgba

    patches = figure.axes[0].patches
    shaded = [p for p in patches if p.get_facecolor() == to_rgba(PLANTED)]
    bars = [p for p in patches if p not in shaded]
    assert (len(shaded), len(bars)) == (2, 3)
    assert bars[0].get_x() == 11.5 and bars[0].get_width() == 2
    # The answer without a place stands in words.
    assert [text.get_text() for text in figure.axes[0].texts] == ["?"]


def test_several_settings_are_not_drawn_as_one():
    with pytest.raises(LocogenError, match="several settings"):
        loco.plot_places(pd.concat([TABLE, TABLE.assign(window=3)]))
    with pytest.raises(LocogenError, match="nothing to draw"):
        loco.plot_places(TABLE.head(0))


def test_shares_are_drawn_against_the_planted_strength():
    points = share_points(TABLE)
    assert points[["localizer", "strength", "share"]].to_numpy().tolist() == [["mine", 0.5, 0.4]]
    # Plants that were not admitted, and rules without one place, say nothing of shares.
    assert share_points(TABLE.assign(scored=False)).empty
    assert share_points(TABLE.assign(rule="either")).empty
    ax = loco.plot_shares(TABLE)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mine"]
    with pytest.raises(LocogenError, match="nothing to draw"):
        loco.plot_shares(TABLE.assign(scored=False))


def scored(*rows: tuple) -> pd.DataFrame:
    columns = ["localizer", "measure", "value", "low", "high", "plants"]
    return pd.DataFrame(rows, columns=columns).assign(**SETTING)


def test_scores_are_laid_out_by_localizer():
    long = scored(
        ("mine", "hit", 1.0, 0.5, 1.0, 4),
        ("mine", "auroc", 0.9, math.nan, math.nan, 1),
        ("other", "hit", 0.0, 0.0, 0.5, 4),
    )
    table = loco.score_table(long)
    assert table.loc["mine"].to_dict() == {"hit": "1.00 [0.50, 1.00]", "AUROC": "0.90"}
    assert table.loc["other", "AUROC"] == "–"
    assert list(loco.score_table(long, ["cpr", "hit"])) == ["hit"], "nobody has a CPR"
    assert list(loco.score_table(long, ["cpr"])) == ["CPR"]
    # Settings that vary are in the index, and so are rules.
    both = loco.score_table(pd.concat([long, long.assign(window=3)]), ["hit"])
    assert both.index.names == ["localizer", "window"] and len(both) == 4
    with pytest.raises(LocogenError, match="no measure 'hits'"):
        loco.score_table(long, ["hits"])


def test_localizers_that_score_alike_are_named_together():
    long = scored(
        ("mine", "right_kind", 1.0, 0.5, 1.0, 4),
        ("blind", "right_kind", 0.0, 0.0, 0.5, 4),
        ("blinder", "right_kind", 0.0, 0.0, 0.5, 4),
    )
    words = loco.describe_benchmark(long)
    assert (
        words == "Right kind: 1.00 [0.50, 1.00] mine; 0.00 [0.00, 0.50] blind, blinder (4 models)."
    )
    # Without what is said first, places hit.
    hits = scored(("mine", "hit", 1.0, 0.5, 1.0, 4))
    assert loco.describe_benchmark(hits) == "Hit: 1.00 [0.50, 1.00] mine (4 models)."
    assert loco.describe_benchmark(hits[:0]) == "No localizer has a score."
