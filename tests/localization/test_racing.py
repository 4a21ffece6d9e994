"""Races: the best window is kept as promised, on real noise and under peeking; rows and tables are in order."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny
from test_localization import STYLE, planted

from locogen.errors import LocogenError
from locogen.localization.effects import carrier, effect
from locogen.localization.localize import localize
from locogen.localization.racing import (
    BUDGET,
    Race,
    bound,
    looks,
    ordered_pairs,
    race,
    reach,
    run_races,
)
from locogen.pictures import fingerprint as fingerprints
from locogen.pictures.fingerprint import fingerprint
from locogen.plan import Concept, PromptPair, sweep

MEASURED = Path(__file__).parent.parent / "benchmarks" / "race_effects.json"


def six(kind="style", prompts=6):
    return Concept(
        "planted", kind, tuple(PromptPair(f"prompt {i}", f"target {i}") for i in range(prompts))
    )


def replay(table, concept, **asked):
    """Race on a table in which everything is made: the raced rows, with what is said of them."""
    places = [None if pd.isna(start) else int(start) for start in table["start"]]
    found = {
        key: i
        for i, key in enumerate(
            zip(table["role"], table["prompt"], places, table["seed"], strict=True)
        )
    }

    def rows_of(plan):
        return [found[row.role, row.prompt, row.start, row.seed] for row in plan]

    def measure(asked):
        return {i: table["clip_score"].to_numpy()[rows_of(rows)] for i, rows in asked.items()}

    ((plan, said),) = run_races(
        [race(concept, **{"n_layers": 16, "window": 2, "seeds": range(4)} | asked)], measure
    )
    lines = pd.DataFrame(said).astype({"looked": "Int64", "sure": float})
    return table.iloc[rows_of(plan)].reset_index(drop=True).join(lines)


def test_looks_begin_with_three_and_end_with_all():
    assert looks(24) == (3, 4, 6, 8, 11, 15, 20, 24)
    assert looks(2) == (2,) and looks(1) == (1,) and looks(3) == (3,) and looks(5) == (3, 4, 5)


def test_reach_is_where_the_bound_turns():
    dice = np.random.default_rng(0)
    other = 1 + 0.1 * dice.standard_normal(8)
    leader = 0.8 * other + 0.02 * dice.standard_normal(8)
    found = reach(leader, other, 0.01)
    assert 0.6 < found < 0.8
    assert (
        bound(leader - (found - 1e-4) * other, 0.01)
        > 0
        > bound(leader - (found + 1e-4) * other, 0.01)
    )
    assert reach(2 * other, leader, 0.01) == 1
    assert reach(-leader, other, 0.01) == 0
    assert bound(other[:2], 0.4) == -math.inf, "two pairs decide nothing"


def test_bound_is_students():
    values = np.array([1.0, 2.0, 4.0])
    assert bound(values, 0.05) == pytest.approx(
        7 / 3 - 2.919986 * values.std(ddof=1) / math.sqrt(3), abs=1e-5
    )


def test_a_race_drops_what_cannot_win_and_makes_a_third_of_the_pictures():
    table = planted({5: 0.4, 6: 0.38, 11: 0.2}, seeds=8)
    raced = replay(table, six(), seeds=range(8))
    assert len(raced) <= BUDGET * len(table)
    window = raced[raced["role"] == "window"].drop_duplicates("start").set_index("start")
    assert window.loc[5, "verdict"] == "chosen"
    assert window.loc[0, "verdict"] == "dropped" and window.loc[0, "looked"] <= 6
    for role in ("baseline", "ceiling", "placebo", "insert"):
        assert (raced["role"] == role).sum() == 48
    assert (raced["start"] == 11).sum() >= 48, "the best that does not overlap is made everywhere"
    effects = effect(raced)
    layer = effects[effects["axis"] == "layer"].set_index("position")
    assert list(layer.index) == list(range(15))
    whole = effect(table)
    other = whole[whole["axis"] == "layer"].set_index("position")
    for name in ("estimate", "low", "high", "share", "share_low", "share_high"):
        assert layer.loc[5, name] == pytest.approx(other.loc[5, name]), (
            "the winner's are those of the whole search"
        )
    assert np.isnan(layer.loc[0, "low"]) and layer.loc[0, "n"] < 48
    assert layer.loc[5, "sure"] > 0.8
    found = carrier(effects)
    assert (
        found.start == 5
        and "cannot be the best" in found.reason
        and "any other window's effect" in found.reason
    )
    assert "ahead of its best rival" in found.reason and "ahead of every other" not in found.reason
    assert "ahead of every other place" in carrier(whole).reason, (
        "which only the whole search can say"
    )


def test_a_race_on_few_noisy_pairs_says_that_it_cannot_tell():
    raced = replay(planted({5: 0.4}, prompts=3, noise=0.1), six(prompts=3))
    assert set(raced["sure"].dropna()) == {0.0} and "dropped" not in set(raced["verdict"])
    assert carrier(effect(raced)).start == 5 and "too few pairs" in carrier(effect(raced)).reason


def test_where_the_budget_is_short_windows_are_cut_and_said_to_be():
    noisy = planted({5: 0.4}, noise=0.4, seeds=12)
    raced = replay(noisy, six(), seeds=range(12), budget=0.2)
    assert len(raced) <= 0.2 * len(noisy)
    assert "cut" in set(raced["verdict"]) and raced["sure"].min() < 0.5
    assert "for the budget's sake" in carrier(effect(raced)).reason


def test_a_small_budget_pays_for_the_windows_that_are_proposed():
    table = planted({5: 0.4, 11: 0.2}, seeds=8)
    with pytest.raises(LocogenError, match="of the pictures at least"):  # the twin: no order
        replay(table, six(), seeds=range(8), budget=0.19)
    raced = replay(
        table, six(), seeds=range(8), budget=0.19, order=lambda: (5, 6, 4, 11, *range(4))
    )
    assert len(raced) <= 0.19 * len(table)
    seen = set(raced.loc[raced["role"] == "window", "start"])
    assert {5, 11} <= seen <= {4, 5, 6, 11, 0, 1, 2, 3} and len(seen) < 8
    effects = effect(raced)
    layer = effects[effects["axis"] == "layer"].set_index("position")
    assert list(layer.index) == list(range(15)) and layer.loc[14, "n"] == 0
    verdict = carrier(effects)
    assert verdict.start == 5
    assert f"{15 - len(seen)} not looked at" in verdict.reason
    assert "too few pairs" in verdict.reason, "nothing is sure of what nobody saw"


def test_an_order_that_hides_the_best_is_not_said_to_be_sure():
    table = planted({5: 0.4, 11: 0.2}, seeds=8)
    raced = replay(table, six(), seeds=range(8), budget=0.19, order=lambda: (11, 10, 12, 0, 1, 2))
    assert raced["sure"].max() == 0.0
    assert "too few pairs to say how near the best it is" in carrier(effect(raced)).reason


def test_a_race_asks_for_an_order_only_when_it_needs_one():
    def never():
        raise AssertionError("the budget pays for all")

    table = planted({5: 0.4}, seeds=8)
    raced = replay(table, six(), seeds=range(8), order=never)
    pd.testing.assert_frame_equal(raced, replay(table, six(), seeds=range(8)))


def test_localize_proposes_where_a_race_has_too_little(tmp_path):
    options = {"num_inference_steps": 1, "batch_size": 33, "scorer": tiny.FakeScorer()}
    options |= {"window": 2, "seeds": range(4), "search": "race", "progress": False}
    run = localize(tiny.pipeline(), [STYLE], budget=0.21, store=tmp_path, **options)
    [proposed] = run.attributions.values()
    assert run.settings["proposal_rows"] == proposed.settings["denoiser_rows"] > 0
    assert run.settings["generations"] > len(run)
    starts = run.table.loc[run.table["role"] == "window", "start"]
    assert starts.nunique() < 15
    enough = localize(tiny.pipeline(), [STYLE], store=tmp_path, **options)
    assert not enough.attributions and "proposal_rows" not in enough.settings


@pytest.mark.parametrize("budget", np.linspace(0.12, 1, 12))
@pytest.mark.parametrize("controls", [True, False])
def test_no_race_overspends(budget, controls):
    for noise, prompts, seeds in ((0.02, 6, 4), (0.3, 6, 12), (0.1, 3, 6), (0.1, 1, 4)):
        concept = six(prompts=prompts)
        table = planted({5: 0.2, 9: 0.2}, noise=noise, prompts=prompts, seeds=seeds)
        every = len(sweep(concept, n_layers=16, window=2, seeds=range(seeds), controls=controls))
        for order in (None, lambda: tuple(range(15))):
            asked = {"seeds": range(seeds), "budget": budget, "controls": controls, "order": order}
            try:
                raced = replay(table, concept, **asked)
            except LocogenError as error:
                assert "of the pictures at least" in str(error)
                continue
            assert len(raced) <= budget * every
            assert not raced.duplicated(["role", "prompt", "start", "seed"]).any()


def test_what_a_race_refuses(tmp_path):
    with pytest.raises(LocogenError, match="at least four, not 3"):
        next(race(six(), n_layers=16, window=2, seeds=range(3)))
    for budget in (0, -1, 1.5, 0.01):
        with pytest.raises(LocogenError, match="of the pictures at least"):
            next(race(six(), n_layers=16, window=2, seeds=range(4), budget=budget))
    with pytest.raises(LocogenError, match="'all', 'race' or 'attribute'"):
        localize(tiny.pipeline(), STYLE, search="fast", scorer=tiny.FakeScorer())  # pyright: ignore[reportArgumentType]


def test_localize_races_with_the_pictures_of_the_whole_search(tmp_path):
    """Same rows, same pictures, byte for byte; and its folder is gone with the run where it has none of its own."""
    pipe = tiny.pipeline()
    options = {
        "num_inference_steps": 1,
        "batch_size": 33,
        "scorer": tiny.FakeScorer(),
        "progress": False,
    }
    whole = localize(pipe, [STYLE], window=2, seeds=range(4), store=tmp_path, **options)
    raced = localize(pipe, [STYLE], window=2, seeds=range(4), search="race", **options)
    assert len(raced) < 0.35 * len(whole) and raced.settings["search"] == "race"
    assert set(raced.table["image"]) < set(whole.table["image"])
    assert [row.prompt for row in raced.plan] == list(raced.table["prompt"])
    both = raced.table.merge(whole.table, on="image")
    assert np.array_equal(both["clip_score_x"], both["clip_score_y"])
    folder = raced.pictures.store.folder
    assert folder.is_dir()
    del raced
    assert not folder.exists()


def test_a_race_hashes_the_weights_once_and_the_next_call_again(monkeypatch):
    """Seconds a look for a large model; what changes between two calls is still noticed."""
    pipe, hashed = tiny.pipeline(), []
    monkeypatch.setattr(
        fingerprints, "fingerprint", lambda of: (hashed.append(fingerprint(of)), hashed[-1])[1]
    )
    options = {"num_inference_steps": 1, "scorer": tiny.FakeScorer(), "progress": False}
    asked = dict(window=2, seeds=range(4), search="race")
    raced = localize(pipe, [STYLE], **asked, **options)
    assert len(hashed) == 1
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    again = localize(pipe, [STYLE], **asked, **options)
    assert len(hashed) == 2 and hashed[0] != hashed[1]
    assert set(again.table["image"]).isdisjoint(raced.table["image"])


# --- the error rate ------------------------------------------------------------------------------


@functools.cache
def residuals() -> np.ndarray:
    """Noise of the mini model's carriers, each with its runner-up and a window of no effect: (draws, 3), standardized.

    From the effects that tests/benchmarks/race.py has measured; one draw is one prompt and seed, its windows together.
    """
    parts = []
    for concept in json.loads(MEASURED.read_text())["concepts"].values():
        effects = np.array(concept["effects"])  # (windows, prompts * seeds)
        order = effects.mean(1).argsort()[::-1]
        if effects[order[0]].mean() < 0.1:
            continue
        chosen = effects[order[[0, 1, -1]]]
        centered = (chosen - chosen.mean(1, keepdims=True)) * math.sqrt(
            chosen.shape[1] / (chosen.shape[1] - 1)
        )
        parts.append((centered / chosen[0].std(ddof=1)).T)
    return np.concatenate(parts)


def naive(leader, other, dice):
    """The twin: one-sided 95 % percentile bootstrap, at every look anew, one window at a time."""
    gap = leader - other
    drawn = gap[dice.integers(len(gap), size=(200, len(gap)))].mean(1)
    return np.quantile(drawn, 0.05) > 0


def lost(decide, dice, *, windows=15, pairs=24, races=400, tied=15, cv=0.3):
    """How often the designated best, first among equals, is dropped; all windows noisy, `tied` of them as good."""
    noise, wrong = residuals(), 0
    for _ in range(races):
        draws = dice.integers(len(noise), size=(pairs, windows))
        common = noise[draws[:, :1], 0]  # the pair's own luck, shared by all windows
        own = noise[draws, dice.integers(2, size=windows)]
        effects = 1 + cv * (
            0.6 * common + 0.8 * own + 0.05 * dice.standard_normal((pairs, windows))
        )
        effects[:, tied:] -= 0.5
        wrong += decide(effects.T)
    return wrong / races


def raced(effects):
    state = Race(*effects.shape)
    for upto in looks(effects.shape[1]):
        state.look(effects[sorted(state.alive), state.seen : upto])
    return state.left.get(0, ("", 0))[0] == "dropped"


def bootstrapped(effects, dice):
    for upto in looks(effects.shape[1]):
        leader = effects[:, :upto].mean(1).argmax()
        if leader and naive(effects[leader, :upto], effects[0, :upto], dice):
            return True
    return False


@pytest.mark.parametrize("tied", [2, 5, 15])
def test_the_best_is_rarely_dropped_however_often_one_looks(tied):
    """Family-wise error over windows and looks, on resampled noise of the mini model: at most 5 % (3 SE allowed)."""
    found = lost(raced, np.random.default_rng(1), tied=tied)
    assert found <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def crossed(dice, *, prompts, seeds, by_prompt, by_seed, windows=15, races=300):
    """How often a race drops the best window for these prompts, and the best for all prompts; all are equal there.

    Every window has a luck of its own with each prompt and with each seed, and with both together.
    """
    pairs = ordered_pairs(six(prompts=prompts), range(seeds))
    at = tuple(np.array([(int(prompt.split()[1]), seed) for prompt, seed in pairs]).T)
    lost = np.zeros(2)
    for _ in range(races):
        own = by_prompt * dice.standard_normal((windows, prompts, 1))
        noise = by_seed * dice.standard_normal((windows, 1, seeds)) + dice.standard_normal(
            (windows, prompts, seeds)
        )
        effects = (10 + own + noise)[:, *at]
        best = int(own.mean((1, 2)).argmax())
        state = Race(windows, len(pairs))
        for upto in looks(len(pairs)):
            state.look(effects[sorted(state.alive), state.seen : upto])
        dropped = [w for w, (how, _) in state.left.items() if how == "dropped"]
        lost += (best in dropped, 0 in dropped)
    return lost / races


@pytest.mark.parametrize(("prompts", "seeds"), [(2, 12), (6, 6), (6, 12)])
def test_what_is_said_holds_for_the_prompts_that_were_asked(prompts, seeds):
    """Prompts and seeds recur in pairs, as they do in the mini model: windows' luck with prompts is the larger part.

    The best window for other prompts may be lost, as racing.py says; the twin shows that this is the lesser claim.
    """
    mine, others = crossed(
        np.random.default_rng(3), prompts=prompts, seeds=seeds, by_prompt=1.8, by_seed=0.3
    )
    assert mine <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert others > mine


def test_seeds_take_turns():
    """So that the first looks see as many seeds and prompts as there are, and the last one every pair."""
    for prompts, seeds in ((6, 12), (6, 4), (2, 5), (1, 4)):
        pairs = ordered_pairs(six(prompts=prompts), range(seeds))
        assert [seed for _, seed in pairs] == list(range(seeds)) * prompts
        assert len(set(pairs)) == len(pairs) == prompts * seeds
        for first in range(0, len(pairs), seeds):
            turn = pairs[first : first + seeds]
            assert len({prompt for prompt, _ in turn}) == min(prompts, seeds)


def alike(dice, *, windows, by_seed, rest, unit, races, effects):
    """6 prompts x 4 seeds, seeds that move all prompts alike: how often the best is dropped, and `sure` wrong.

    The first window is the best; all beyond `effects` have none. `unit`: what counts as a draw.
    """
    pairs = ordered_pairs(six(), range(4))
    prompts, seeds = np.array([(int(prompt.split()[1]), seed) for prompt, seed in pairs]).T
    truth = np.r_[effects, np.zeros(windows - len(effects))]
    wrong = np.zeros(2)
    for _ in range(races):
        noise = by_seed * dice.standard_normal((windows, 1, 4))
        noise = noise + rest * dice.standard_normal((windows, 6, 4))
        drawn = truth[:, None] + noise[:, prompts, seeds]
        state = Race(windows, len(pairs), seeds=seeds.tolist() if unit == "seed" else None)
        for upto in looks(len(pairs)):
            state.look(drawn[sorted(state.alive), state.seen : upto])
        dropped = state.left.get(0, ("", 0))[0] == "dropped"
        wrong += (dropped, state.sure > truth[state.alive[0]] / truth.max() + 1e-9)
    return wrong / races


@pytest.mark.parametrize(("windows", "rivals"), [(2, 1), (15, 4)])
def test_seeds_are_the_unit_where_they_move_all_prompts_alike(windows, rivals):
    """The claimed 5 % holds, of the best being dropped and of `sure`; with pairs for draws it is far from holding."""
    effects = (0.42, *[0.40] * rivals)
    case = dict(windows=windows, effects=effects, by_seed=0.15, rest=0.02, races=200)
    dropped, wrong = alike(np.random.default_rng(4), unit="seed", **case)
    assert max(dropped, wrong) <= 0.05
    dropped, wrong = alike(np.random.default_rng(4), unit="pair", **case)
    assert dropped > 0.15 and wrong > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("windows", [2, 5, 15])
@pytest.mark.parametrize("by_seed", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("effects", [(0.42, 0.40), (0.41, 0.41), (0.42, 0.3)])
def test_the_claimed_error_rate_holds_however_much_seeds_vary(windows, by_seed, effects):
    case = dict(windows=windows, by_seed=by_seed, rest=0.05, races=1000, effects=effects)
    found = alike(np.random.default_rng(5), unit="seed", **case)
    assert max(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_pairs_of_one_seed_count_together():
    values = np.array([1.0, 2.0, 3.0, 2.0, 3.0, 4.0])
    seeds = [7, 8, 9, 7, 8, 9]
    means = np.array([1.5, 2.5, 3.5])  # of each seed
    assert bound(values, 0.05, seeds) == pytest.approx(bound(means, 0.05))
    assert bound(values, 0.05) > bound(values, 0.05, seeds), "the twin: six draws say more"
    assert bound(values, 0.05, [7, 7, 7, 8, 8, 8]) == -math.inf, "two seeds decide nothing"


@pytest.mark.slow
def test_a_winner_of_chance_is_not_called_a_carrier():
    """Picked among fifteen on some of the pictures that test it: without the correction it passes too often."""
    wrong = np.zeros(2)
    flat = planted({}, noise=0.0, prompts=12)  # the same before every draw
    draws = 40
    for draw in range(draws):
        dice = np.random.default_rng(draw)
        luck = {
            (p, w): dice.normal(0, 0.1) for p in dict.fromkeys(flat["prompt"]) for w in range(15)
        }
        own = [luck.get((p, w), 0.0) for p, w in zip(flat["prompt"], flat["start"], strict=True)]
        noise = np.array(own) + dice.normal(0, 0.05, len(flat))
        table = flat.assign(clip_score=flat["clip_score"] + noise)
        layer = effect(replay(table, six(prompts=12))).query("axis == 'layer'")
        found = layer.loc[layer["verdict"] == "chosen", "p_any"].iloc[0]
        wrong += (found <= 0.05, found / 15 <= 0.05)
    assert wrong[0] / draws <= 0.05 < wrong[1] / draws


def test_a_plain_bootstrap_does_not_survive_peeking():
    dice = np.random.default_rng(1)
    assert lost(functools.partial(bootstrapped, dice=dice), dice) > 0.2


def test_what_is_said_of_the_winner_holds():
    """`sure` is a bound for the winner's true effect over the best one's."""
    dice, wrong, told = np.random.default_rng(2), 0, []
    truth = np.r_[1.0, 0.95, 0.9, 0.6, np.zeros(11)]
    noise = residuals()
    for _ in range(400):
        effects = truth[:, None] + 0.3 * noise[dice.integers(len(noise), size=(15, 16)), 0]
        state = Race(15, 16)
        for upto in looks(16):
            state.look(effects[sorted(state.alive), state.seen : upto])
        wrong += state.sure > truth[state.alive[0]] / truth.max() + 1e-9
        told.append(state.sure)
    assert wrong / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert np.median(told) > 0.5, "and says something"


def test_settings_are_recorded():
    assert dataclasses.is_dataclass(Race) and Race(15, 24).tail == pytest.approx(0.05 / 14 / 8)
