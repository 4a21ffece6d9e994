"""Search by attribution: few pictures, seeds that chose nothing, and a bound on what is missed that holds."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import tiny
from support.sweeps import planted

from locogen.benchmarks.run import counting_rows
from locogen.errors import LocogenError
from locogen.localization.attribution.search import (
    MOST_SCOUTS,
    Planned,
    drawn_at_random,
    scouts,
    search,
    with_rival,
)
from locogen.localization.effects import carrier, effect
from locogen.localization.localize import localize
from locogen.localization.racing import run_races
from locogen.plan import Concept, PromptPair, sweep

STYLE = Concept("s", "style", (PromptPair("cat in a", "cat"), PromptPair("dog in a", "dog")))


def concept(prompts=6):
    pairs = tuple(PromptPair(f"prompt {i}", f"target {i}") for i in range(prompts))
    return Concept("planted", "style", pairs)


def replay(table, order, *, prompts=6, seeds=4, **options):
    """Search in a table in which everything is made, the scouts' seeds too: the rows that judge, and the plan."""
    starts = [None if pd.isna(start) else int(start) for start in table["start"]]
    keys = zip(table["role"], table["prompt"], starts, table["seed"], strict=True)
    places = {key: place for place, key in enumerate(keys)}
    scores = table["clip_score"].to_numpy()

    def places_of(rows):
        return [places[row.role, row.prompt, row.start, row.seed] for row in rows]

    def measure(requests):
        return {number: scores[places_of(rows)] for number, rows in requests.items()}

    layout: dict[str, Any] = {
        "n_layers": len(order) + 1,
        "window": 2,
        "seeds": range(seeds),
    } | options
    [result] = run_races([search(concept(prompts), order=order, **layout)], measure)
    plan = Planned(*result)
    types = {
        "looked": "Int64",
        "windows": "Int64",
        "others": "Int64",
        "sampled": "Int64",
        "hits": "Int64",
    }
    verdicts = pd.DataFrame(plan.verdicts).astype(types | {"missed": float})
    return table.iloc[places_of(plan.rows)].reset_index(drop=True).join(verdicts), plan


def ranking(*first, windows=15):
    return [*first, *(start for start in range(windows) if start not in first)]


# --- which windows are measured, and by whom -----------------------------------------------------


def test_seeds_that_judge_have_chosen_nothing():
    table = planted({5: 0.4, 6: 0.3}, seeds=5)
    _, plan = replay(table, ranking(5, 6, 4))
    choosing = {row.seed for row in plan.others}
    judging = {row.seed for row in plan.rows}
    assert judging == set(range(4))
    assert choosing and choosing.isdisjoint(judging)
    for numbers in (range(4), [9, 3], [0]):
        for prompts in (1, 6):
            scout = scouts(concept(prompts), numbers)
            assert set(scout.seeds).isdisjoint(numbers)
            assert 1 <= len(scout.concept.pairs) * len(scout.seeds) <= MOST_SCOUTS


def test_the_best_measured_window_is_chosen_and_not_the_first_of_the_ranking():
    table = planted({5: 0.4, 6: 0.2}, seeds=5)
    judged, _ = replay(table, ranking(6, 5, 4))
    windows = judged[judged["role"] == "window"].drop_duplicates("start").set_index("start")
    assert windows.index[windows["verdict"] == "chosen"].tolist() == [5]
    # The twin: were one window of the ranking measured, it would be the first.
    narrow, _ = replay(table, ranking(6, 5, 4), best=1)
    windows = narrow[narrow["role"] == "window"].drop_duplicates("start").set_index("start")
    assert windows.index[windows["verdict"] == "chosen"].tolist() == [6]


def test_the_rival_overlaps_none_of_the_best():
    assert with_rival(ranking(5, 6, 4, 7), 3, 2) == (5, 6, 4, 0)
    assert with_rival(ranking(5, 4), 1, 2) == (5, 0)
    assert with_rival([0, 1], 2, 2) == (0, 1)


def test_everything_that_was_measured_is_judged_as_in_the_whole_sweep():
    table = planted({5: 0.4, 6: 0.3}, seeds=5)
    judged, plan = replay(table, ranking(5, 6, 4))
    whole = effect(table[table["seed"] < 4])
    found = effect(judged)
    on_layers = found["axis"] == "layer"
    assert found[on_layers]["position"].tolist() == list(range(15))
    ours = found[on_layers].set_index("position").loc[5]
    theirs = whole[whole["axis"] == "layer"].set_index("position").loc[5]
    for name in ("estimate", "low", "high", "share", "share_low", "share_high", "n"):
        assert ours[name] == pytest.approx(theirs[name])
    # Two windows are tested where the whole sweep tests fifteen: never with more correction.
    assert ours["p_any"] <= theirs["p_any"]
    verdict = carrier(found)
    assert verdict.start == 5
    assert verdict.start == carrier(whole).start
    assert "of 15 windows measured" in verdict.reason
    assert "not looked at" in verdict.reason
    assert "random pictures" in verdict.reason
    assert "measured" not in carrier(whole).reason
    unseen = found[on_layers & (found["n"] == 0)]
    assert len(unseen) and unseen["estimate"].isna().all()
    assert [row.role for row in plan.rows].count("insert") == 24


def test_few_pictures_are_made_however_many_windows_there_are():
    """Pictures of the search, without the proposal, of those of the whole sweep: 16 layers, and 67."""
    shares = []
    for windows in (15, 66):
        table = planted({5: 0.4}, seeds=5, layers=windows + 1)
        _, plan = replay(table, ranking(5, windows=windows))
        every = sweep(concept(), n_layers=windows + 1, seeds=range(4))
        shares.append((len(plan.rows) + len(plan.others)) / len(every))
    # Two proposals of 57 rows, in pictures of 24 rows (12 steps, two halves), are 0.6 and 0.15 %.
    assert shares[0] <= 0.22 - 0.006
    assert shares[1] <= 0.06 - 0.0015


def test_without_controls_a_window_is_named_by_its_pictures_alone():
    table = planted({5: 0.4}, seeds=5)
    judged, _ = replay(table, ranking(5), controls=False)
    assert set(judged["role"]) == {"baseline", "window"}
    assert carrier(effect(judged)).start == 5


def test_one_window_needs_no_choice():
    table = planted({0: 0.4}, seeds=5, layers=2)
    judged, plan = replay(table, [0])
    assert not plan.others
    assert set(judged["verdict"].dropna()) == {"chosen"}
    assert "random" not in carrier(effect(judged)).reason


# --- what nothing proposed -----------------------------------------------------------------------


def test_a_window_that_nothing_proposed_is_seen_by_the_sample_and_measured():
    """Two places are needed, and the ranking puts one of them last."""
    table = planted({5: 0.4, 11: 0.45}, seeds=5)
    order = [*(start for start in ranking(5, 6, 4) if start != 11), 11]
    judged, plan = replay(table, order)
    windows = judged[judged["role"] == "window"].drop_duplicates("start").set_index("start")
    assert windows.loc[11, "verdict"] == "challenger" and windows.loc[11, "looked"] == 24
    verdict = carrier(effect(judged))
    assert [place.start for place in verdict.places] == [5, 11]
    # The twin: without what the sample saw there is one place.
    proposed = judged[judged["verdict"] != "challenger"]
    assert [place.start for place in carrier(effect(proposed)).places] == [5]
    assert len(plan.rows) > len(proposed)


def test_a_window_of_the_sample_is_tested_with_a_correction_for_all():
    """It was picked by some of the pictures that judge it."""
    table = planted({5: 0.4, 11: 0.45}, seeds=5, noise=0.2)
    order = [*(start for start in ranking(5, 6, 4) if start != 11), 11]
    judged, _ = replay(table, order)
    assert "challenger" in set(judged["verdict"])
    corrected = effect(judged).query("axis == 'layer'").set_index("position")["p_any"]
    plain = effect(judged.assign(verdict=judged["verdict"].replace("challenger", "rival")))
    plain = plain.query("axis == 'layer'").set_index("position")["p_any"]
    assert corrected[11] == pytest.approx(min(1, 15 * plain[11]))
    assert plain[11] > 0


def test_the_sample_is_drawn_alike_each_time_and_otherwise_for_other_concepts():
    windows, pairs = range(11), [("a", seed) for seed in range(24)]
    assert drawn_at_random(windows, pairs, [1, 2]) == drawn_at_random(windows, pairs, [1, 2])
    assert drawn_at_random(windows, pairs, [1, 2]) != drawn_at_random(windows, pairs, [3, 2])
    few = drawn_at_random(windows, pairs[:4], [1])
    assert len({start for start, _ in few.cells}) == len(few.cells) == 4


def bounds(hit, draws, naive=False):
    """How often less is said to be missed than is. `hit`: (windows, pairs), whether a picture would."""
    windows, pairs = hit.shape
    keys = [("a", pair) for pair in range(pairs)]
    wrong = 0
    for draw in range(draws):
        sample = drawn_at_random(range(windows), keys, [draw])
        hits = sum(bool(hit[start, pair]) for start, (_, pair) in sample.cells)
        claim = hits / len(sample.cells) if naive else sample.missed(hits)
        wrong += claim < hit.mean() - 1e-12
    return wrong / draws


def hits_of(kind, share, windows):
    """Which pictures of (windows, 24 pairs) would hit."""
    hit = np.zeros((windows, 24), dtype=bool)
    count = round(share * windows)
    if kind == "whole windows":
        hit[:count] = True
    elif kind == "halves of windows":
        hit[: 2 * count, ::2] = True
    elif kind == "whole pairs":
        hit[:, : round(share * 24)] = True
    return hit


@pytest.mark.parametrize(("windows", "share"), [(11, 0.2), (62, 0.1)])
@pytest.mark.parametrize("kind", ["whole windows", "halves of windows", "whole pairs"])
def test_no_more_is_missed_than_is_said(windows, share, kind):
    """Error at most 5 %, however the hits lie; the twin, the share of hits seen, is wrong more often."""
    hit = hits_of(kind, share, windows)
    draws = 400
    assert bounds(hit, draws) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    # With each of eleven windows drawn once, whole windows are seen for certain.
    is_certain = windows == 11 and kind == "whole windows"
    assert bounds(hit, draws, naive=True) > 0.2 or is_certain


# --- with a model --------------------------------------------------------------------------------

OPTIONS = {
    "num_inference_steps": 2,
    "batch_size": 8,
    "scorer": tiny.FakeScorer(),
    "progress": False,
}


@pytest.mark.slow
def test_the_pictures_are_those_of_the_whole_sweep_and_all_costs_are_counted(tmp_path):
    pipe = tiny.pipeline()
    # One at a time, so that no row is there for padding.
    asked: dict[str, Any] = {
        "window": 2,
        "seeds": range(2),
        **OPTIONS,
        "batch_size": 1,
        "num_inference_steps": 1,
    }
    with counting_rows(pipe) as counted:
        run = localize(pipe, STYLE.first(1), search="attribute", **asked)
    whole = localize(pipe, STYLE.first(1), store=tmp_path, **asked)
    assert set(run.table["image"]) <= set(whole.table["image"])
    both = run.table.merge(whole.table, on="image")
    assert np.array_equal(both["clip_score_x"], both["clip_score_y"])
    assert len(run) < len(whole) / 2
    settings = run.settings
    assert settings["search"] == "attribute"
    # Every row that a hook saw, and for each gradient two more, since it is three passes.
    [proposed] = run.attributions.values()
    gradients = proposed.shares.shape[2] * 3  # steps, points
    assert settings["denoiser_rows"] == counted.rows + 2 * gradients
    assert settings["proposal_rows"] == proposed.settings["denoiser_rows"]
    made = len(run) + settings["choosing_pictures"]
    assert settings["generations"] == made + math.ceil(proposed.settings["pictures"])
    assert settings["choosing_pictures"] == 5


def test_a_search_leaves_the_model_as_it_was():
    pipe = tiny.pipeline()
    asked = {w: (v.requires_grad, v._version) for w, v in pipe.unet.named_parameters()}
    localize(pipe, STYLE, search="attribute", seeds=range(2), window=2, **OPTIONS)
    assert {w: (v.requires_grad, v._version) for w, v in pipe.unet.named_parameters()} == asked
    assert all(v.grad is None for v in pipe.unet.parameters())


@pytest.mark.slow
def test_the_narrowest_window_that_decides_is_proposed_once_for_all_widths(monkeypatch):
    from locogen.localization import localize as module
    from locogen.plan import Verdict

    proposals = []
    propose = module.propose
    monkeypatch.setattr(
        module,
        "propose",
        lambda *args, **kwargs: (proposals.append(1), propose(*args, **kwargs))[1],
    )

    def judged(effects):
        width = int(effects["width"].iloc[0])
        return Verdict(None, width, kind="one place" if width == 2 else "spread")

    monkeypatch.setattr(module, "carrier", judged)
    asked: dict[str, Any] = {"window": "auto", "search": "attribute", "seeds": (0,), **OPTIONS}
    run = localize(pipe := tiny.pipeline(), STYLE, **asked)
    assert set(run.table["width"].dropna()) == {2} and run.settings["window"] == 2
    assert len(proposals) == 1
    # What was made for the width that did not decide counts as well.
    narrow = localize(pipe, STYLE, **asked | {"window": 2})
    assert run.settings["generations"] > narrow.settings["generations"]


@pytest.mark.slow
def test_several_concepts_are_searched_side_by_side():
    other = Concept("t", "object", (PromptPair("big cat", "big"),))
    run = localize(
        tiny.pipeline(), [STYLE, other], search="attribute", seeds=range(2), window=2, **OPTIONS
    )
    assert list(run.attributions) == ["s", "t"]
    for _, rows in run.table.groupby("concept"):
        assert "chosen" in set(rows["verdict"])
    effects: Any = effect(run.table)
    for name in ("s", "t"):
        assert carrier(effects[effects["concept"] == name]).reason


def test_what_is_refused():
    pipe = tiny.pipeline()
    with pytest.raises(LocogenError, match="no timesteps"):
        localize(pipe, STYLE, search="attribute", timesteps=[(0, 0)], **OPTIONS)
    with pytest.raises(LocogenError, match="'all', 'race' or 'attribute'"):
        localize(pipe, STYLE, search="gradient", **OPTIONS)  # pyright: ignore[reportArgumentType]
