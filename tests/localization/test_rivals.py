"""Localizers side by side: they take the same arguments, and agree with themselves."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import tiny

from locogen.errors import LocogenError
from locogen.localization.comparison import (
    Agreement,
    Located,
    agree,
    agreement,
    localizers,
    locate,
)
from locogen.plan import Concept, PromptPair, Window
from locogen.views import localizer_plots as trace_plots

CONCEPT = Concept("cat", "style", (PromptPair("a big cat b", "a big b"),))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Located]:
    pipe, store = tiny.pipeline(), tmp_path_factory.mktemp("store")
    options: dict[str, Any] = dict(
        seeds=range(2), num_inference_steps=1, guidance_scale=1.0, batch_size=16, progress=False
    )
    options |= dict(scorer=tiny.FakeScorer(), store=store)
    return {name: locate(pipe, CONCEPT, name, **options) for name in localizers()["name"]}


def test_each_fills_the_same_table(found):
    assert list(found) == [*("locogen", "causal tracing", "attention contribution", "attribution")]
    for name, one in found.items():
        effects = one.effects
        assert list(effects.columns[:8]) == [
            "method",
            "concept",
            "axis",
            "position",
            "estimate",
            "low",
            "high",
            "n",
        ]
        assert set(effects["method"]) == {name} and set(effects["concept"]) == {"cat"}
        axis = "cross-attention" if name == "causal tracing" else "layer"
        lines = effects[effects["axis"] == axis]
        assert one.layers.shape == (len(lines), 1, 2)
        assert one.layers.mean((1, 2)) == pytest.approx(lines["estimate"].to_numpy())
        assert isinstance(one.carrier, Window) and one.told and one.seconds > 0


def test_the_cost_is_counted(found):
    counts = {name: one.generations for name, one in found.items()}
    assert counts["locogen"] == 2 * (2 * 15 + 3) and counts["attention contribution"] == 2
    # One step: the path, both ends, three gradients of three passes; twelve rows a seed.
    assert counts["attribution"] == 2 * 12
    states = 70 + 2 * 2 * 3 - 4  # of a one-token subject, first and last are the same: made once
    assert counts["causal tracing"] >= 2 * (1 + 1 + states)
    assert counts["causal tracing"] <= 2 * (1 + 1 + states) + 2 * (70 // 15 + 1)


def test_a_localizer_agrees_with_itself_and_not_with_its_opposite(found):
    one = found["attention contribution"]
    same = agree(one, one)
    assert same.correlation == pytest.approx(1) and same.same is True and same.high >= 0.99
    turned = Located("turned", "cat", one.effects, -one.layers, Window(None, 2, "none"), 1, 0.0)
    other = agree(one, turned)
    assert (
        other.correlation == pytest.approx(-1)
        and other.same is None
        and other.carrier_second == "none"
    )
    assert (other.generations_first, other.generations_second) == (2, 1)


def test_single_layers_are_averaged_over_windows(found):
    one, layers = found["locogen"], found["attention contribution"].layers
    windows = np.stack([layers[i : i + 2].mean(0) for i in range(15)])
    moved = Located("moved", "cat", one.effects, windows, Window(3, 2), 1, 0.0)
    assert agree(moved, found["attention contribution"]).correlation == pytest.approx(1)
    table = pd.DataFrame([agree(one, moved), agree(moved, one)])
    assert table["correlation"].nunique() == 1 and list(table["first"]) == ["locogen", "moved"]
    far = Located("far", "cat", one.effects, windows, Window(9, 2), 1, 0.0)
    assert agree(moved, far).same is False


def rows_of(first, second):
    """Rows of agreement from the first layers of windows of two."""
    row = Agreement("", "a", "b", 0.9, 0.8, 1.0, True, "", "", 1, 1)
    rows = []
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        layers = dict(layers_first=(one, one + 1), layers_second=(other, other + 1))
        rows.append(row._replace(concept=f"concept {number}", **layers))
    return rows


def test_a_constant_answer_wins_no_agreement():
    """31 of 33 answers of one localizer hold layer 12: a constant overlaps with nearly all, and its kappa is none."""
    dice = np.random.default_rng(0)
    first = [*dice.choice([11, 12], 31), 3, 5]
    constant = agreement(rows_of(first, [12] * 33)).iloc[0]
    assert constant["same"] == constant["constant"] == pytest.approx(31 / 33)
    assert constant["kappa"] == pytest.approx(0) and constant["p_value"] == 1
    itself = agreement(rows_of(first, first)).iloc[0]
    assert itself["same"] == itself["kappa"] == 1 and itself["p_value"] < 0.01
    assert itself["constant"] > 0.9, "the twin: what the constant answer gets is beside it"


def test_shuffled_concepts_agree_by_chance_only():
    dice = np.random.default_rng(1)
    found = []
    for _ in range(40):
        first, second = dice.integers(15, size=(2, 30))
        found.append(agreement(rows_of(first, second), draws=99).iloc[0])
    assert abs(np.mean([row["kappa"] for row in found])) < 0.05
    assert np.mean([row["p_value"] <= 0.05 for row in found]) <= 0.15


def test_agreement_counts_only_concepts_for_which_both_name_layers():
    rows = rows_of([3, 9], [3, 9])
    rows.append(rows[0]._replace(concept="nowhere", layers_second=()))
    assert agreement(rows).iloc[0]["concepts"] == 2
    assert np.isnan(agreement(rows[-1:]).iloc[0]["kappa"])
    with pytest.raises(LocogenError, match="concept twice"):
        agreement([rows[0], rows[0]])
    with pytest.raises(LocogenError, match="nothing to sum up"):
        agreement([])


def test_what_cannot_be_compared_is_refused(found):
    one = found["locogen"]
    with pytest.raises(LocogenError, match="two concepts"):
        agree(one, Located("x", "dog", one.effects, one.layers, one.carrier, 1, 0.0))
    wider = dataclasses.replace(one, layers=one.layers[1:], effects=one.effects.assign(width=3))
    with pytest.raises(LocogenError, match="of different widths"):
        agree(found["locogen"], wider)
    with pytest.raises(LocogenError, match="no localizer 'causal': did you mean"):
        locate(None, CONCEPT, "causal")


# --- plots ---------------------------------------------------------------------------------------


def test_the_heatmap_draws_each_state_at_its_layer(found):
    effects = found["causal tracing"].effects
    matrix = trace_plots.trace_matrix(effects, text=False)
    assert sorted(matrix.index) == ["cross-attention", "feed-forward", "resnet", "self-attention"]
    assert (
        matrix.shape == (4, 22)
        and matrix.loc["resnet"].notna().all()
        and matrix.loc["feed-forward"].isna().sum() == 6
    )
    lines = effects.set_index(["axis", "position"])["estimate"]
    assert matrix.loc["cross-attention", 7] == lines["cross-attention", 7]
    text = trace_plots.trace_matrix(effects, text=True)
    assert text.shape == (6, 2)
    scales = [
        trace_plots.plot_trace(effects, text=side).collections[0].get_clim()
        for side in (True, False)
    ]
    assert scales[0] == scales[1], "one scale for both sides"
    with pytest.raises(LocogenError, match="denoiser"):
        trace_plots.trace_matrix(effects[effects["axis"].str.startswith("text")], text=False)


def test_profiles_are_shares_of_their_largest():
    def told(values, **more):
        return pd.DataFrame(
            {"axis": "layer", "position": range(len(values)), "estimate": values, **more}
        )

    ends = dict(low=[0.0] * 3, high=[0.4] * 3)
    effects = {
        "a": told([0.1, 0.2, 0.0], width=2, **ends),
        "b": told([5.0, 1.0, 10.0], width=1, **ends),
    }
    table = trace_plots.profiles(effects)
    assert list(table["value"]) == [0.5, 1, 0, 0.5, 0.1, 1] and list(table["at"]) == [
        0.5,
        1.5,
        2.5,
        0,
        1,
        2,
    ]
    assert list(table["high"][:3]) == [2, 2, 2]
    ax = trace_plots.plot_profiles(effects)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(LocogenError, match="c has no layer with a positive effect"):
        trace_plots.plot_profiles({"c": told([-1.0, 0.0, -2.0], width=1, low=0, high=0)})
