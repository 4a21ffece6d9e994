"""The verdict on sweeps whose truth is known: the right kind, the right places, and how often.

Rates are of simulated sweeps, each with the numbers of prompts and seeds that it names.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from support.sweeps import planted

from locogen.errors import LocogenError
from locogen.localization.effects import carrier, effect
from locogen.localization.verdict import separate
from locogen.plan import Verdict, Window

CEILING = 0.5
Table = Callable[[int], pd.DataFrame]


def verdict(table: pd.DataFrame) -> Verdict:
    return carrier(effect(table))


def kinds(make: Table, draws: int) -> Counter[str]:
    return Counter(verdict(make(seed)).kind for seed in range(draws))


def shares(sizes: Mapping[int, float], restored: float | None = None, **options: Any) -> Table:
    """Sweeps whose windows have these shares of the ceiling; `restored`: what each brings back."""
    carried = {start: CEILING * share for start, share in sizes.items()}
    back = None if restored is None else dict.fromkeys(sizes, CEILING * restored)
    return lambda seed: planted(carried, ceiling=CEILING, restored=back, seed=seed, **options)


FEW: dict[str, Any] = {"prompts": 1, "seeds": 4}
MANY: dict[str, Any] = {"prompts": 6, "seeds": 6}


# --- the right kind ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_two_places_of_which_the_picture_needs_each_are_never_one(size: dict[str, int]) -> None:
    found = kinds(shares({2: 0.8, 11: 0.8}, noise=0.03, **size), 10)
    assert found["one place"] == 0
    assert found["each necessary"] >= 9
    assert kinds(shares({2: 0.8}, noise=0.03, **size), 10)["one place"] >= 9, "the twin"


def test_places_that_each_suffice_are_found_by_their_inserts() -> None:
    table = planted({}, ceiling=CEILING, restored={0: 0.5, 12: 0.45})
    found = verdict(table)
    assert str(found) == "layers 0-1 and layers 12-13, each sufficient"
    assert list(found) == [] and [list(place) for place in found.places] == [[0, 1], [12, 13]]
    nothing = verdict(planted({}, ceiling=CEILING))
    assert nothing.kind == "spread" and not nothing.places, "the twin"


def test_everywhere_is_no_place() -> None:
    found = kinds(shares(dict.fromkeys(range(15), 0.6), **MANY), 5)
    assert found["spread"] == 5
    wide = verdict(shares(dict.fromkeys(range(8, 13), 0.3), noise=0.01, **MANY)(0))
    assert wide.kind == "spread" and wide.places == (Window(8, 6),)


@pytest.mark.parametrize("share", [0.45, pytest.param(0.4, marks=pytest.mark.slow)])
def test_a_window_that_matters_little_is_seldom_named(share: float) -> None:
    """One prompt and four seeds; a share of 0.9 is named."""
    assert kinds(shares({5: share}, noise=0.08, **FEW), 20)["one place"] <= 3
    assert kinds(shares({5: 0.9}, noise=0.03, **FEW), 10)["one place"] >= 9


@pytest.mark.parametrize("size", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "ceiling",
    [0.5, 0.0, *(pytest.param(ceiling, marks=pytest.mark.slow) for ceiling in (0.05, -0.1))],
)
def test_pure_noise_is_no_carrier(size: dict[str, int], ceiling: float) -> None:
    named = 0
    for seed in range(10):
        table = planted({}, ceiling=ceiling, restored={}, noise=0.1, seed=seed, **size)
        named += len(verdict(table)) > 0
    assert named <= 1


def test_a_model_that_does_not_hear_has_no_place() -> None:
    deaf = verdict(planted({}, ceiling=0.0, noise=0.005))
    assert deaf.kind == "nobody" and "even in all layers" in deaf.reason
    noisy = verdict(planted({}, ceiling=0.03, noise=0.2))
    assert noisy.kind == "inconclusive" and "would tell" in noisy.reason


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("style", "raises the score in all layers, by 0.50 [0.4"),
        ("fact", "lowers the score in all layers, by 0.50 [0.4"),
    ],
)
def test_a_target_that_moves_the_score_the_other_way_is_heard(kind: Any, words: str) -> None:
    swapped = verdict(planted({}, ceiling=-0.5, noise=0.02, kind=kind))
    assert swapped.kind == "inconclusive" and words in swapped.reason
    assert "swap prompt and target" in swapped.reason and "hardly" not in swapped.reason
    # The twins: too little to matter on either side, and too uncertain to say.
    for ceiling in (-0.005, 0.005):
        assert verdict(planted({}, ceiling=ceiling, noise=0.002)).kind == "nobody"
    uncertain = verdict(planted({}, ceiling=-0.03, noise=0.2))
    assert uncertain.kind == "inconclusive" and "would tell" in uncertain.reason


@pytest.mark.parametrize("scale", [1, 0.02, 1e-4])
def test_a_clear_effect_is_heard_on_a_scale_smaller_than_cosines(scale: float) -> None:
    def scaled(ceiling: float, **options: Any) -> Verdict:
        table = planted({5: 0.9 * ceiling}, ceiling=ceiling, **options)
        return verdict(table.assign(clip_score=table["clip_score"] * scale))

    assert scaled(0.5).start == 5
    swapped = scaled(-0.5)
    assert swapped.kind == "inconclusive" and "raises the score" in swapped.reason
    assert "by 0.00 " not in swapped.reason
    # The twins: small beside the scores, however clear; and not clear.
    assert scaled(0.01, noise=0.001).kind == "nobody"
    assert scaled(0.0, noise=0.01).kind == "nobody"


@given(st.floats(0.6, 100), st.floats(1e-4, 0.02))
@settings(max_examples=5)
def test_a_scorer_whose_zero_means_nothing_is_told_what_to_do(offset: float, scale: float) -> None:
    """Another zero and unit of the same scores: no rule can tell a small effect from a large one."""
    heard = planted({5: 0.9 * CEILING}, ceiling=CEILING, prompts=1)
    moved = heard.assign(clip_score=heard["clip_score"] * scale + offset)
    judged = verdict(moved)
    assert judged.kind == "nobody" and "clearly, but by less than 0.02" in judged.reason
    assert "take a constant from all its scores" in judged.reason and " 0.00 [" not in judged.reason
    # The remedy, the twin: the score of a picture that shows nothing is zero again.
    assert verdict(moved.assign(clip_score=moved["clip_score"] - offset)).start == 5
    unclear = verdict(planted({}, ceiling=0.0, noise=0.005))
    assert unclear.kind == "nobody" and "constant" not in unclear.reason


def test_what_is_uncertain_is_not_said_to_hardly_change() -> None:
    """A ceiling of 0.59 [-0.04, 1.21] may be a large one: more pictures tell."""
    wide = verdict(planted({}, ceiling=0.5, noise=1.0, prompts=1))
    assert wide.kind == "inconclusive" and "not clear that the target changes" in wide.reason
    assert "hardly" not in wide.reason and "would tell" in wide.reason
    narrow = verdict(planted({}, ceiling=0.0, noise=0.005))
    assert "hardly changes" in narrow.reason, "the twin"


def without_controls(carried: Mapping[int, float], **options: Any) -> Verdict:
    table = planted(carried, **options)
    return verdict(table[table["role"].isin(("baseline", "window"))])


@pytest.mark.parametrize(("kind", "moves"), [("style", "raises"), ("fact", "lowers")])
def test_windows_that_move_the_score_the_other_way_are_said_to(kind: Any, moves: str) -> None:
    losses = {start: -0.1 if start == 5 else -0.5 for start in range(15)}
    backward = without_controls(losses, kind=kind)
    assert backward.kind == "inconclusive"
    words = (
        f"the target {moves} the score even in the window with the largest mean, layers 5-6, by 0."
    )
    assert words in backward.reason and "swap prompt and target" in backward.reason
    # The twins: ahead, but not clearly of zero; and ahead of nothing.
    ahead = without_controls(losses | {5: -0.02}, kind=kind, noise=0.1)
    assert "layers 5-6 are ahead of every other place, but it is not clear" in ahead.reason
    assert "no window is ahead" in without_controls({}).reason


def test_an_effect_of_the_other_sign_is_not_denied() -> None:
    """Every window raises the score: none lowers it, and that is all that is said."""
    table = planted(dict.fromkeys(range(15), -0.3), ceiling=CEILING, restored={})
    assert verdict(table).reason.startswith("no window clearly lowers the score more than")
    fact = planted(dict.fromkeys(range(15), -0.3), ceiling=CEILING, restored={}, kind="fact")
    assert verdict(fact).reason.startswith("no window clearly raises the score more than")
    heard = planted({5: 0.9 * CEILING}, ceiling=CEILING)
    assert "no window" not in verdict(heard).reason, "the twin"


def all_or_nothing(q: float, seed: int, seeds: int) -> pd.DataFrame:
    """One window takes the whole concept in a share q of the pictures, and nothing in the others."""
    table = planted({}, ceiling=CEILING, noise=0.02, seed=seed, prompts=6, seeds=seeds)
    dice = np.random.default_rng(seed)
    at: Any = (table["role"] == "window") & (table["start"] == 5).fillna(False)
    table.loc[at, "clip_score"] -= CEILING * (dice.random(at.sum()) < q)
    return table


@pytest.mark.parametrize(("q", "least"), [(0.75, 0.5), (0.9, 0.9)])
def test_effects_of_all_or_nothing_are_not_missed(q: float, least: float) -> None:
    found = [verdict(all_or_nothing(q, seed, 4)) for seed in range(10)]
    assert np.mean([best.start == 5 for best in found]) >= least
    assert not [best for best in found if best.start not in (5, None)]


# --- another picture -----------------------------------------------------------------------------


def test_a_window_that_wrecks_the_picture_is_said_to() -> None:
    """Content lost far beyond the ceiling's, and an insert that restores nothing."""
    table = planted({5: 0.45}, ceiling=CEILING, restored={})
    at: Any = (table["role"] == "window") & (table["start"] == 5).fillna(False)
    table.loc[at, "content_score"] -= 0.3
    found = verdict(table)
    assert found.kind == "inconclusive" and "another picture came" in found.reason
    assert "ahead of" not in found.reason
    assert verdict(planted({5: 0.45}, ceiling=CEILING)).start == 5, "the twin"


def test_an_effect_far_beyond_the_ceiling_is_another_picture() -> None:
    for ceiling in (0.02, 0.15):
        found = verdict(planted({5: 0.3}, ceiling=ceiling, restored={}, noise=0.005))
        assert found.start is None and "ahead of" not in found.reason
    assert "another picture came" in found.reason


# --- as an object --------------------------------------------------------------------------------


def test_a_verdict_is_a_window() -> None:
    found = verdict(planted({7: 0.45}))
    assert isinstance(found, Window) and list(found) == [7, 8] and found.label == "7-8"
    assert found.places == (Window(7, 2),) and str(found) == "layers 7-8"
    assert "needs it" in found.reason and "suffices" in found.reason
    assert found == verdict(planted({7: 0.45})) and hash(found) is not None


def test_its_evidence_is_tidy() -> None:
    rows = verdict(planted({7: 0.45})).evidence
    assert not rows.duplicated(["question", "place"]).any()
    assert set(rows["question"]) == {
        *("ceiling", "necessity", "sufficiency", "content", "another picture")
    }
    passing = rows[rows["passes"].fillna(False) & (rows["question"] == "necessity")]
    assert list(passing["start"]) == [7]
    assert 0.7 < passing["share_low"].iloc[0] < 0.9 < passing["share_high"].iloc[0] < 1.1


def test_few_prompts_are_said() -> None:
    assert "for these prompts" in verdict(planted({7: 0.45}, prompts=2)).reason
    assert "for these prompts" not in verdict(planted({7: 0.45}, prompts=6)).reason


def test_windows_around_one_layer_are_one_place() -> None:
    found = verdict(planted({12: 0.45, 13: 0.46}))
    assert list(found) in ([12, 13], [13, 14]) and "all with layer 13" in found.reason


@pytest.mark.parametrize(
    ("starts", "width", "places"),
    [((), 2, []), ((3, 4), 1, [3, 4]), ((8, 9, 10, 11), 2, [8, 10]), ((0, 5, 6, 7), 3, [0, 5])],
)
def test_places_do_not_overlap_and_leave_nothing_out(
    starts: tuple[int, ...], width: int, places: list[int]
) -> None:
    found = separate(starts, width, {start: 1 - start / 100 for start in starts})
    assert [place.start for place in found] == places


# --- the score -----------------------------------------------------------------------------------


def test_a_probability_is_used_where_there_is_one_and_both_are_shown() -> None:
    """The cosine says layers 3-4, the probability 9-10: which picture is wrong moves the cosine."""
    cosine = planted({3: 0.45})
    table = cosine.assign(probability=planted({9: 0.45})["clip_score"])
    found: Any = effect(table).query("axis == 'layer'").set_index("position")
    assert set(found["score"]) == {"probability"}
    assert found.loc[9, "estimate"] > 0.4 > 0.1 > found.loc[3, "estimate"]
    assert found.loc[3, "cosine"] > 0.4 and found.loc[3, "cosine_low"] > 0.3
    asked = effect(table, score="clip_score")
    pd.testing.assert_frame_equal(asked, effect(cosine))
    assert verdict(table).start == 9 and carrier(asked).start == 3
    with pytest.raises(LocogenError, match="no probability"):
        effect(cosine, score="probability")
    with pytest.raises(LocogenError, match="use 'probability'"):
        effect(cosine, score="cosine")  # pyright: ignore[reportArgumentType]


def test_a_probability_that_some_pictures_lack_is_not_used() -> None:
    table = planted({3: 0.45}).assign(probability=0.5)
    table.loc[4, "probability"] = np.nan
    assert set(effect(table)["score"]) == {"clip_score", "content_score"}


def test_a_scorer_that_cannot_tell_is_said() -> None:
    """As mini's scorer with pixel art: 0.66 with it, 0.53 without."""
    table = planted({3: 0.12}, ceiling=0.13, noise=0.005)
    found = verdict(table.assign(probability=table["clip_score"]))
    assert found.kind == "inconclusive" and "hardly tells" in found.reason
    assert re.search(r"takes away 0\.1\d+ \[0\.1\d+, 0\.1\d+\]", found.reason)
    assert verdict(table).start == 3, "the twin: a cosine has no such scale"


@pytest.mark.parametrize(("noise", "hardly"), [(0.005, True), (0.1, False)])
def test_a_scorer_is_said_to_hardly_tell_only_where_the_interval_says_so(
    noise: float, hardly: bool
) -> None:
    """The same change, below half of what is possible: surely, or by few pictures' luck."""
    table = planted({3: 0.2}, ceiling=0.22, noise=noise)
    found = verdict(table.assign(probability=table["clip_score"].clip(0, 1)))
    assert found.kind == "inconclusive"
    assert ("the scorer hardly tells" in found.reason) == hardly
    assert ("not clear whether the scorer tells" in found.reason) != hardly
    assert bool(re.search(r"about \d+ seeds would tell$", found.reason)) != hardly


def test_an_open_share_says_how_many_seeds_would_tell() -> None:
    table = planted({5: 0.25}, prompts=2, seeds=4, noise=0.12)
    found = verdict(table)
    assert found.kind == "inconclusive" and "seeds would tell" in found.reason
    assert found.places == (Window(5, 2),)
    needed = found.evidence.query("question == 'necessity' and start == 5")["seeds"].iloc[0]
    assert needed > 4
