"""The map of an attribution: what is drawn is what the table says, on one scale for both maps."""

import itertools

import numpy as np
import pandas as pd
import pytest

from locogen.errors import LocogenError
from locogen.views.attribution_plots import (
    attribution_matrix,
    attribution_shares,
    completeness,
    plot_attribution,
)

WORDS = ("(start)", "neon", "cat", "(end)", "(pad)", "(pad)")


def shares(prompts=("a neon cat",), *, words=WORDS):
    """A table of two seeds, two steps and three layers, whose shares are all different."""
    axes = (prompts, range(2), (0, 4), range(3), range(len(words)))
    rows = [
        {"prompt": p, "seed": s, "step": t, "layer": y, "token": k, "word": words[k]}
        for p, s, t, y, k in itertools.product(*axes)
    ]
    table = pd.DataFrame(rows).assign(concept="neon", kind="style")
    values = np.random.default_rng(0).normal(size=len(table))
    return table.assign(share=values / values.sum())


def test_each_cell_is_the_mean_over_seeds_of_a_sum():
    table = shares()
    by_step = attribution_matrix(table, "step")
    cell = table.query("step == 4 and layer == 2")["share"].sum() / 2
    assert np.isclose(by_step.loc[4, 2], cell)
    by_token = attribution_matrix(table, "token")
    cell = table.query("token == 1 and layer == 2")["share"].sum() / 2
    assert np.isclose(by_token.loc["1 neon", 2], cell)
    assert np.isclose(by_step.to_numpy().sum(), by_token.to_numpy().sum())
    assert not np.allclose(by_step.to_numpy()[0], by_token.to_numpy()[0])


def test_words_are_on_the_axis_and_all_padding_is_one_row():
    assert list(attribution_matrix(shares(), "token").index) == [
        *("0 (start)", "1 neon", "2 cat", "3 (end)", "(pad)")
    ]


def test_the_two_maps_have_one_scale():
    table = shares()
    limits = []
    for by in ("step", "token"):
        mesh = plot_attribution(table, by=by).collections[0]
        limits.append(mesh.get_clim())
    assert limits[0] == limits[1]
    largest = max(attribution_matrix(table, by).to_numpy().max() for by in ("step", "token"))
    assert np.isclose(limits[0][1], largest)


def test_the_title_says_what_the_shares_sum_to():
    table = shares()
    whole = table.assign(share=table["share"] * 2)  # two seeds: 1 each, had they equal sums
    text = completeness(whole)
    assert text.startswith("shares sum to")
    assert text in plot_attribution(whole).get_title(loc="left")
    half = whole.assign(share=whole["share"] / 2)
    assert completeness(half) != text


def test_pooled_text_is_in_the_sum_and_in_no_layer():
    table = shares()
    pooled = table.iloc[[0]].assign(layer=pd.NA, token=pd.NA, word=None, share=9.0)
    both = pd.concat([table, pooled], ignore_index=True).astype(
        {"layer": "Int64", "token": "Int64"}
    )
    assert attribution_matrix(both, "step").equals(attribution_matrix(table, "step"))
    assert completeness(both) != completeness(table)
    assert len(plot_attribution(both, by="token").get_yticklabels()) == 5


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(LocogenError, match="one attribution"):
        attribution_matrix(pd.concat([shares(), shares().assign(concept="cat")]))
    with pytest.raises(LocogenError, match="prompt"):
        attribution_matrix(shares(), "token", prompt="a nean cat")
    with pytest.raises(LocogenError, match="token"):
        attribution_matrix(shares().assign(token=pd.NA), "token")
    with pytest.raises(LocogenError, match="axis"):
        attribution_matrix(shares(), "head")


def test_shares_are_both_maps_cell_by_cell():
    table = shares()
    whole = attribution_shares(table, table.assign(concept="cat"))
    assert list(whole["concept"].unique()) == ["neon", "cat"]
    for by in ("step", "token"):
        rows = whole[(whole["concept"] == "neon") & (whole["by"] == by)]
        matrix = attribution_matrix(table, by)
        again = rows.pivot(index="label", columns="layer", values="share")
        again = again.loc[[str(label) for label in matrix.index]]
        assert np.allclose(again.to_numpy().astype(float), matrix.to_numpy())
        assert list(dict.fromkeys(rows["label"])) == [str(label) for label in matrix.index]
    chained = table.assign(token=float("nan"), word=None)
    assert set(attribution_shares(chained)["by"]) == {"step"}, "no tokens, no such map"
