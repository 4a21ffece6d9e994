"""From plan to carrier: the tables' contracts, planted carriers found, absent ones not."""

import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from support import tiny
from support.sweeps import planted

from locogen import catalog, stats
from locogen.catalog import mini_folder, model_entry
from locogen.errors import LocogenError
from locogen.localization import localize as localization, scored_pictures
from locogen.localization.effects import carrier, carrier_evidence, effect
from locogen.localization.localize import localize
from locogen.models.load import load
from locogen.pictures.runs import generate
from locogen.pictures.store import PictureStore
from locogen.plan import Concept, PromptPair, Verdict, sweep
from locogen.views.explorer import Explorer
from locogen.views.tables import describe

STYLE = Concept("s", "style", (PromptPair("cat in a", "cat"), PromptPair("dog in a", "dog")))
FACT = Concept("f", "fact", (PromptPair("cat of b", "dog of b"),))
COLUMNS = [
    "concept",
    "kind",
    "role",
    "prompt",
    "target",
    "text",
    "start",
    "width",
    "seed",
    "edit",
    "image",
    "clip_score",
    "content_score",
]


def test_localize_end_to_end_on_the_tiny_pipeline(tmp_path):
    pipe = tiny.pipeline()
    options = {
        "num_inference_steps": 1,
        "batch_size": 33,
        "scorer": tiny.FakeScorer(),
        "progress": False,
    }
    run = localize(pipe, [STYLE, FACT], window=2, seeds=(0,), store=tmp_path, **options)
    assert list(run.table.columns[: len(COLUMNS)]) == COLUMNS
    assert len(run.table) == len(run.plan) == 3 * 33
    assert [row.prompt for row in run.plan] == list(run.table["prompt"])
    silent = run.table["content_score"].isna()
    assert list(silent) == list(run.table["kind"] == "fact")
    reds = [np.asarray(picture, float)[..., 0].mean() / 255 for picture in run.pictures]
    assert np.allclose(reds, run.table["clip_score"])
    assert run.settings["scorer"] == "fake"
    effects = effect(run.table)
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
    assert set(effects[effects["concept"] == "s"]["axis"]) == {
        "layer",
        "insert",
        "content",
        "content_ceiling",
        "content_placebo",
        "ceiling",
        "placebo",
    }
    assert not effects["axis"][effects["concept"] == "f"].str.startswith("content").any()


def test_a_sweep_towards_nothing_has_effects_and_no_content(tmp_path):
    """Beside a pair whose target says what should stay, that one alone has content; alone, none."""
    pipe = tiny.pipeline()
    empty, full = PromptPair("a cat in b", ""), PromptPair("cat in b", "cat")
    style = Concept("both", "style", (empty, full))
    options = {
        "num_inference_steps": 1,
        "batch_size": 16,
        "scorer": tiny.FakeScorer(),
        "progress": False,
    }
    concepts = [style, Concept("cat", "object", (empty,))]
    run = localize(pipe, concepts, window=8, seeds=(0,), store=tmp_path, **options)
    silent = run.table["content_score"].isna()
    assert list(silent) == list(run.table["prompt"] == empty.prompt)
    effects = effect(run.table)
    parts = dict(iter(effects.groupby("concept")))
    assert parts["both"].set_index("axis").loc["content_ceiling", "n"] == 1
    assert parts["both"].set_index("axis").loc["ceiling", "n"] == 2
    assert not parts["cat"]["axis"].str.startswith("content").any()
    pictures = dict(
        zip(zip(run.table["concept"], run.table["role"], strict=True), run.pictures, strict=True)
    )
    ceiling = np.asarray(pictures["cat", "ceiling"])
    plain = generate(pipe, [""], num_inference_steps=1, batch_size=16, progress=False)
    assert np.abs(ceiling.astype(int) - np.asarray(plain.pictures[0])).max() <= 1
    assert not np.array_equal(ceiling, np.asarray(pictures["cat", "baseline"]))
    assert "both" in describe(effects) and "content" not in describe(parts["cat"])
    look = Explorer(run, pipe).first_look()
    assert [shown.score is None for shown in Explorer(run, pipe).show(look)] == [
        False,
        False,
        False,
    ]


def test_a_concept_without_a_known_word_is_not_localized():
    pair = PromptPair("a picture of a 猫", "a picture")
    with pytest.raises(LocogenError, match="knows no word of '猫'"):
        localize(load("mini"), Concept("猫", "object", (pair,)), seeds=(0,))


def test_effects_are_paired_and_signed():
    """Style: baseline minus window; fact: window minus baseline; so a carrier is positive for both."""
    for kind in ("style", "fact"):
        effects = effect(planted({5: 0.4}, kind=kind, noise=0.0))
        layer = effects[effects["axis"] == "layer"].set_index("position")
        assert layer.loc[5, "estimate"] == pytest.approx(0.4)
        assert layer.loc[4, "estimate"] == pytest.approx(0.0)
        insert = effects[effects["axis"] == "insert"].set_index("position")
        assert insert.loc[5, "estimate"] == pytest.approx(0.4)
        assert effects.set_index("axis").loc["ceiling", "estimate"] == pytest.approx(0.5)
        assert layer.loc[5, "share"] == pytest.approx(0.8)


def test_content_lost_has_the_controls_beside_it():
    table = planted({5: 0.4}, noise=0.0)
    for role, kept in (("ceiling", 0.45), ("placebo", 0.38)):
        table.loc[table["role"] == role, "content_score"] = kept
    table.loc[
        (table["role"] == "window") & (table["start"] == 5).fillna(False), "content_score"
    ] = 0.3
    effects = effect(table)
    content = effects[effects["axis"] == "content"].set_index("position")["estimate"]
    assert content[5] == pytest.approx(0.1) and content[4] == pytest.approx(0.0)
    assert effects.set_index("axis").loc["content_ceiling", "estimate"] == pytest.approx(-0.05)
    assert effects.set_index("axis").loc["content_placebo", "estimate"] == pytest.approx(0.02)


class Recorded(Exception):
    """Carries what `generate` was asked, in the place of making it."""


def test_what_is_not_given_is_the_catalogs(monkeypatch):
    def asked(source, **given):
        pipe = tiny.pipeline()
        pipe.register_to_config(_name_or_path=source)
        with pytest.raises(Recorded) as caught:
            localize(pipe, STYLE, seeds=(0,), scorer=tiny.FakeScorer(), **given)
        plan, options = caught.value.args
        return plan[1].width, options["num_inference_steps"], options["guidance_scale"]

    def generate(pipe, plan, **options):
        raise Recorded(plan, options)

    entry = dataclasses.replace(model_entry("sd-1.5"), window=3, guidance_scale=5.0)
    monkeypatch.setattr(catalog.models, "model_entries", lambda: (model_entry("mini"), entry))
    monkeypatch.setattr(scored_pictures, "generate", generate)
    for source in (entry.id, entry.mirrors[0]):
        assert asked(source, window=None) == (3, 50, 5.0)
    assert asked(entry.id) == (2, 50, 5.0), "the window is 2 unless it is left open"
    assert asked(entry.id, window=1, num_inference_steps=4, guidance_scale=1.0) == (1, 4, 1.0)
    assert asked(str(mini_folder()), window=None) == (2, 12, 7.5)
    assert asked("of/ones-own", window=None) == asked("") == (2, 20, 7.5)


def test_the_row_order_of_the_table_does_not_matter():
    table = planted({5: 0.4})
    one, other = effect(table), effect(table.sample(frac=1, random_state=3))
    assert carrier(one) == carrier(other)
    both = [t.loc[t["axis"] == "layer", "estimate"].to_numpy() for t in (one, other)]
    assert np.allclose(*both)


def test_a_planted_carrier_is_found_with_confidence():
    best = carrier(effect(planted({7: 0.25, 8: 0.45, 9: 0.2}, seeds=8)))
    assert (best.start, best.width) == (8, 2)
    assert "ahead of every other place" in best.reason


def test_a_window_without_rivals_has_no_lead():
    """As wide as nearly the whole model: every window overlaps the best one."""
    found = carrier(effect(planted({0: 0.5, 1: 0.4}, layers=3)))
    assert (found.start, found.width) == (0, 2) and "ahead" not in found.reason
    alone = carrier(effect(planted({0: 0.5}, layers=2)))
    assert alone.start == 0 and "ahead" not in alone.reason


def test_no_effect_is_no_carrier():
    best = carrier(effect(planted({})))
    assert best.start is None
    assert "placebo" in best.reason
    assert "even in all layers" in carrier(effect(planted({}, ceiling=0.0))).reason
    assert carrier(effect(planted({3: 0.4}))).start == 3  # the twin


def test_a_small_share_of_the_ceiling_is_no_carrier():
    best = carrier(effect(planted({2: 0.1, 11: 0.09}, noise=0.005)))
    assert best.start is None and best.kind == "spread"
    assert "20 %" in best.reason and "of the ceiling" in best.reason
    assert "together: layers 2-3 and layers 11-12" in best.reason


def test_two_equal_places_are_said():
    best = carrier(effect(planted({2: 0.4, 11: 0.4}, noise=0.05)))
    assert best.start is None
    assert str(best) == "layers 2-3 and layers 11-12, each necessary"


def test_neighbors_suggest_a_wider_window():
    best = carrier(effect(planted({4: 0.2, 6: 0.19}, noise=0.01)))
    assert best.start is None
    assert "wider window, 4-7" in best.reason


def test_false_alarms_are_rare_where_nothing_is_carried():
    """Windows that do nothing under a real ceiling: at most 5 % of studies may name one, with Monte-Carlo slack.

    Prompts and seeds have effects of their own on every place, as in a real sweep; the twin goes by the largest effect.
    """
    table, dice, studies = planted({}, noise=0.0, layers=6), np.random.default_rng(0), 40
    shared = [["role", "start", *more] for more in (["prompt"], ["seed"], ["prompt", "seed"])]
    groups = [table.groupby(columns, dropna=False).ngroup().to_numpy() for columns in shared]
    named, twin = 0, 0
    for _ in range(studies):
        noise = sum(
            spread * dice.standard_normal(group.max() + 1)[group]
            for spread, group in zip((0.2, 0.1, 0.1), groups, strict=True)
        )
        effects = effect(table.assign(clip_score=table["clip_score"] + noise))
        named += carrier(effects).start is not None
        twin += bool(effects.query("axis == 'layer'")["estimate"].max() > 0)
    assert named / studies <= stats.ALPHA + 3 * math.sqrt(stats.ALPHA * (1 - stats.ALPHA) / studies)
    assert twin / studies > 0.5


def test_few_prompts_say_so():
    assert set(effect(planted({5: 0.4}, prompts=3))["prompts"]) == {"fixed"}
    assert set(effect(planted({5: 0.4}, prompts=6))["prompts"]) == {"random"}


def test_a_paraphrase_that_helps_makes_no_carrier():
    """The placebo raises the score: windows that do nothing do "more" than it, and still carry nothing."""
    for seed in range(5):
        table = planted({}, seed=seed)
        table.loc[table["role"] == "placebo", "clip_score"] += 0.2
        assert carrier(effect(table)).start is None


def test_one_seed_and_few_prompts_cannot_tell():
    best = carrier(effect(planted({5: 0.4}, prompts=3, seeds=1)))
    assert best.start is None
    assert "use more" in best.reason


def test_one_seed_still_answers():
    best = carrier(effect(planted({5: 0.45}, prompts=8, seeds=1)))
    assert best.start == 5


def test_bad_tables_are_refused():
    with pytest.raises(LocogenError, match="empty"):
        effect(planted({}).iloc[:0])
    with pytest.raises(LocogenError, match="without a score"):
        effect(planted({}).assign(clip_score=np.nan))
    with pytest.raises(LocogenError, match="twice"):
        effect(pd.concat([planted({}), planted({})]))
    with pytest.raises(LocogenError, match="placebo pictures some are missing"):
        effect(planted({}).drop(index=32))
    effects = effect(planted({}))
    with pytest.raises(LocogenError, match="2 concepts"):
        carrier(pd.concat([effects, effects.assign(concept="other")]))


def test_bad_questions_are_refused():
    pipe = tiny.pipeline()
    with pytest.raises(LocogenError, match="at most 16"):
        localize(pipe, STYLE, window=17, scorer=tiny.FakeScorer())
    for given, said in (
        ([], "at least one"),
        ([STYLE, STYLE], "no name twice"),
        ("mini/neon", "loco.concept"),
    ):
        with pytest.raises(LocogenError, match=said):
            localize(pipe, given)
    with pytest.raises(LocogenError, match=r"range\(4\)"):
        localize(pipe, STYLE, seeds=4)
    with pytest.raises(LocogenError, match="clip-vit-b-16"):  # before any picture is made
        localize(pipe, STYLE, scorer="clip-vit-b16")


def test_without_controls_a_carrier_is_still_named():
    table = planted({5: 0.4}).query("role in ('baseline', 'window')")
    found = carrier(effect(table))
    assert (found.start, found.width, found.kind) == (5, 2, "one place")
    assert "ahead of every other place" in found.reason and "without controls" in found.reason
    noise = carrier(effect(planted({}).query("role in ('baseline', 'window')")))
    assert noise.kind == "inconclusive", "the twin"


def neon(store):
    """A small sweep of the mini model, in batches of two."""
    pair = PromptPair("a picture of a cat in the style of neon", "a picture of a cat")
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "batch_size": 2, "progress": False}
    return localize(
        load("mini"), Concept("neon", "style", (pair,)), seeds=(0,), store=store, **options
    )


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    """SIGKILL among the pictures: what is there stays as it is, the rest is made, and all is as without the kill."""
    folder = str(tmp_path / "broken")
    start = f"import sys; sys.path.append('..'); import test_localization; test_localization.neon({folder!r})"
    with subprocess.Popen([sys.executable, "-c", start], cwd=Path(__file__).parent) as process:
        while len(list((tmp_path / "broken").glob("[0-9a-f]*.png"))) < 5:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.kill()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("[0-9a-f]*.png")}
    assert 5 <= len(kept) < 33

    made, put = [], PictureStore.put
    monkeypatch.setattr(
        PictureStore,
        "put",
        lambda store, *given: (made.append(store.folder.name), put(store, *given)),
    )
    runs = [neon(tmp_path / name) for name in ("broken", "whole")]
    assert [made.count(name) for name in ("broken", "whole")] == [33 - len(kept), 33]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    scores = ["clip_score", "content_score"]
    pd.testing.assert_frame_equal(*(run.table.drop(columns=scores) for run in runs))
    one, other = (np.stack([np.asarray(picture, int) for picture in run.pictures]) for run in runs)
    assert np.abs(one - other).max() <= 1
    assert (
        np.abs(one - np.roll(other, 1, axis=0)).max() > 1
    )  # the twin: the pictures are not all alike


def test_windows_over_time_are_an_axis_of_their_own():
    """A concept that enters at steps 0-1 and window 2; the axis of whole windows is as without it."""
    spans = [(0, 1), (2, 4)]
    pairs = tuple(PromptPair(f"prompt {i}", f"target {i}") for i in range(6))
    plan = sweep(Concept("planted", "style", pairs), n_layers=5, seeds=range(4), timesteps=spans)
    lost = {("window", 2, None): 0.4, ("ceiling", None, None): 0.5, ("timesteps", 2, (0, 1)): 0.3}
    table = pd.DataFrame(
        [
            {"role": r.role, "prompt": r.prompt, "start": r.start, "width": r.width, "seed": r.seed}
            | {
                "first_timestep": (r.timesteps or (None,))[0],
                "last_timestep": (r.timesteps or (None,))[-1],
            }
            | {
                "clip_score": 0.6 - lost.get((r.role, r.start, r.timesteps), 0.0),
                "content_score": 0.4,
            }
            for r in plan
        ]
    ).astype(dict.fromkeys(["start", "width", "first_timestep", "last_timestep"], "Int64"))
    table = table.assign(concept="planted", kind="style")
    found = effect(table)
    timed = found[found["axis"] == "timesteps"]
    at = timed.set_index(["first_timestep", "last_timestep", "position"])["estimate"]
    assert len(at) == 2 * 4
    assert at[0, 1, 2] == pytest.approx(0.3)
    assert at.drop((0, 1, 2)).abs().max() < 1e-9
    without = effect(table[table["role"] != "timesteps"])
    rest = found[found["axis"] != "timesteps"][list(without.columns)].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, without)
    with pytest.raises(LocogenError, match="timesteps pictures some are missing"):
        effect(table.drop(table.index[(table["role"] == "timesteps")][3]))


def test_localize_over_time_end_to_end(tmp_path):
    pipe = tiny.sdxl()
    options = {
        "num_inference_steps": 2,
        "batch_size": 16,
        "scorer": tiny.FakeScorer(),
        "progress": False,
    }
    spans = {"timesteps": [(0, 0), (1, 1)], "pooled": "target"}
    run = localize(
        pipe, STYLE, window=4, seeds=(0,), store=tmp_path, controls=False, **spans, **options
    )
    assert len(run) == 2 * (1 + 5 + 2 * 5)
    effects = effect(run.table)
    assert (effects["axis"] == "timesteps").sum() == 2 * 5
    assert set(run.table["pooled"]) == {"keep", "target"}
    assert set(run.table.loc[run.table["role"] == "timesteps", "first_timestep"]) == {0, 1}


class Telling(tiny.FakeScorer):
    """The redder a picture, the more of the first text is in it, and the less of all others."""

    settings: ClassVar = {"scorer": "telling", "logit_scale": 4.0}

    def __call__(self, pictures, *texts):
        red = np.array([np.asarray(picture, float)[..., 0].mean() / 255 for picture in pictures])
        return [red, *[1 - red for _ in texts[1:]]]


def test_scores_become_probabilities_among_neighbors(tmp_path):
    pipe = tiny.pipeline()
    options = {"num_inference_steps": 1, "batch_size": 16, "progress": False, "seeds": (0,)}
    style = dataclasses.replace(STYLE, neighbors=("b",), name="a")
    fact = Concept("b", "fact", FACT.pairs, answer="a", neighbors=("cat",))
    run = localize(
        pipe, [style, fact, STYLE], window=8, scorer=Telling(), store=tmp_path, **options
    )
    red = run.table["clip_score"]
    share = 1 / (1 + 2 * np.exp(4 * (1 - 2 * red)))  # one text among three
    for name, expected in (("a", share), ("b", (share + 1 - (1 - share) / 2) / 2)):
        rows = run.table["concept"] == name
        assert np.allclose(run.table.loc[rows, "probability"], expected[rows]), name
    assert run.table.loc[run.table["concept"] == "s", "probability"].isna().all()
    effects = effect(run.table)
    used = effects[effects["axis"] == "layer"].groupby("concept")["score"].first().to_dict()
    assert used == {"a": "probability", "b": "probability", "s": "clip_score"}
    plain = localize(pipe, style, window=8, scorer=tiny.FakeScorer(), store=tmp_path, **options)
    assert plain.table["probability"].isna().all(), "a scorer without a scale"


def test_a_window_as_wide_as_the_evidence_asks(monkeypatch, tmp_path):
    pipe = tiny.pipeline()
    options = {"num_inference_steps": 1, "batch_size": 16, "progress": False, "seeds": (0,)}
    decided = {1: "spread", 2: "one place", 3: "one place"}

    def judged(effects):
        width = int(effects["width"].iloc[0])
        return Verdict(None, width, kind=decided[width])

    monkeypatch.setattr(localization, "carrier", judged)
    run = localize(pipe, STYLE.first(1), window="auto", scorer=tiny.FakeScorer(), **options)
    assert set(run.table["width"].dropna()) == {2} and run.settings["window"] == 2
    assert len(run) == 2 * 15 + 3
    decided[2] = "inconclusive"
    wider = localize(pipe, STYLE.first(1), window="auto", scorer=tiny.FakeScorer(), **options)
    assert set(wider.table["width"].dropna()) == {3}
    with pytest.raises(LocogenError, match="one width"):
        localize(pipe, STYLE, window="auto", search="race", seeds=range(4))


def test_nothing_has_no_share():
    """Where all layers together do nothing at all: no division by zero; the twin has a ceiling."""
    effects = np.arange(8.0).reshape(2, 1, 4)  # (windows, prompts, seeds)
    options = {"placebo": None, "width": 1, "level": 0.95}
    nothing = carrier_evidence(effects, ceiling=np.zeros((1, 1, 4)), **options)
    assert all(np.isnan(line["share"]) for line in nothing)
    whole = carrier_evidence(effects, ceiling=np.full((1, 1, 4), 2.0), **options)
    assert all(line["share"] > 0 for line in whole)
