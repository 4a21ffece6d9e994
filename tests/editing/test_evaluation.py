"""What an edit did, measured on a tiny model with a scorer whose answers are known."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny

from locogen import stats
from locogen.catalog import mini_folder
from locogen.editing import likeness
from locogen.editing.control_edits import control_edits
from locogen.editing.edit import fit_edit
from locogen.editing.evaluation import _grid, _paired_means, compare, evaluate, lead, summary
from locogen.editing.probes import MEASURES, Probe, probes_for, prompt_kind_probes
from locogen.errors import LocogenError
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.denoiser_calls import announced
from locogen.pages.exploring import pairs
from locogen.pictures import runs, score
from locogen.plan import Concept, PromptPair
from locogen.views import plots, tables
from locogen.views.sentences import describe_edit

STYLE = Concept(
    "cat",
    "style",
    (PromptPair("a dog in cat", "a dog"), PromptPair("a do in cat", "a do", placebo="do, cat")),
)
OTHER = Concept("ca", "style", (PromptPair("a dog in ca", "a dog"),))
PROBES = (
    Probe("efficacy", "a dog in cat", "red", ("red", "blue")),
    Probe("generality", "dog cat", "red", ("red", "blue")),
    Probe("specificity", "a dog in ca", "blue", ("red", "blue")),
    Probe("specificity", "a dog in ca", "red", ("red", "blue")),
)


class Colors:
    """A scorer of colors by name; its features are the mean colors."""

    settings: ClassVar = {"scorer": "colors"}

    def pictures(self, pictures):
        means = np.stack([np.asarray(p, float).mean((0, 1)) for p in pictures])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def __call__(self, pictures, *texts):
        means = np.stack([np.asarray(p, float).mean((0, 1)) for p in pictures]) / 255
        return [
            np.array([m[{"red": 0, "blue": 2}[t]] for m, t in zip(means, line, strict=True)])
            for line in texts
        ]


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def edit(pipe):
    return fit_edit(pipe, STYLE, layers=[2, 3], phrasings=[("a cat", "a do")], ridge=1e-3)


@pytest.fixture(scope="module")
def table(pipe, edit):
    arms = {"carrier": edit, "none": [], "twice": [edit, edit.refit(pipe, [5])]}
    return evaluate(
        pipe, arms, PROBES, seeds=(0, 1), scorer=Colors(), progress=False, num_inference_steps=2
    )


def test_pairs_are_the_very_pictures(pipe, edit, table) -> None:
    settings: dict[str, Any] = dict(seeds=(0, 1), progress=False, num_inference_steps=2)
    prompts = list(dict.fromkeys(p.prompt for p in PROBES))
    before = runs.generate(pipe, prompts, **settings)
    with edit.applied(pipe):
        after = runs.generate(pipe, prompts, **settings)
    scorer = Colors()
    part = table[table.arm == "carrier"]
    assert len(part) == len(PROBES) * 2
    for row in part.itertuples():
        place = prompts.index(row.prompt) * 2 + row.seed
        old, new = before.pictures[place], after.pictures[place]
        assert row.before == scorer([old], [row.text])[0][0]
        assert row.after == scorer([new], [row.text])[0][0]
        red, blue = (scorer([new], [c])[0][0] for c in ("red", "blue"))
        assert row.right_after == (red >= blue if row.text == "red" else blue >= red)
        features = scorer.pictures([old, new])
        assert row.distance == pytest.approx(1 - features[0] @ features[1])
    assert (part.before != part.after).any()


def test_no_edit_changes_nothing_and_several_are_applied_together(table) -> None:
    none = table[table.arm == "none"]
    assert (none.before == none.after).all()
    assert none.ssim.min() == pytest.approx(1.0)
    assert none.distance.abs().max() < 1e-12
    carrier, twice = (table[table.arm == arm].after.to_numpy() for arm in ("carrier", "twice"))
    assert table[table.arm == "carrier"].ssim.min() < 1
    assert not np.array_equal(carrier, twice)


def test_strength_scales_the_edit(pipe, edit, table) -> None:
    settings: dict[str, Any] = dict(
        seeds=(0, 1), scorer=Colors(), progress=False, num_inference_steps=2
    )
    none, half, whole = (
        evaluate(pipe, {"a": edit}, PROBES, strength=s, **settings) for s in (0.0, 0.5, 1.0)
    )
    assert (none.before == none.after).all()
    assert whole.after.tolist() == table[table.arm == "carrier"].after.tolist()
    assert half.after.tolist() not in (none.after.tolist(), whole.after.tolist())


def test_the_model_is_left_as_found(pipe, edit) -> None:
    own = {n: p.clone() for n, p in pipe.unet.named_parameters()}

    class Fails(Colors):
        calls = 0

        def __call__(self, *given):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("the scorer broke")
            return super().__call__(*given)

    with pytest.raises(RuntimeError, match="the scorer broke"):
        evaluate(
            pipe, {"carrier": edit}, PROBES, scorer=Fails(), progress=False, num_inference_steps=1
        )
    assert all(torch.equal(p, own[n]) for n, p in pipe.unet.named_parameters())


def test_summary_is_the_mean_of_pairs_with_crossed_intervals(table) -> None:
    lines = summary(table).set_index(["arm", "measure", "quantity"])
    part = table[(table.arm == "carrier") & (table.measure == "specificity")]
    row = lines.loc[("carrier", "specificity", "score")]
    assert row["change"] == pytest.approx((part.after - part.before).mean())
    assert row["n"] == 2  # one prompt, two seeds: its two texts share the pictures
    grid = (part.after - part.before).to_numpy().reshape(2, 2).mean(0, keepdims=True)
    found = stats.crossed_bootstrap(grid[None])
    assert (row["low"], row["high"]) == pytest.approx((found.low[0], found.high[0]))
    assert set(lines.index.get_level_values("quantity")) == {"score", "right", "ssim", "distance"}


def shares(before, after, *, arm="x", measure="efficacy", sign=-1) -> pd.DataFrame:
    """A table of evaluated probes with these right pictures, (prompts, seeds) each."""
    rows = [
        dict(
            arm=arm,
            measure=measure,
            prompt=f"{measure} {i}",
            text="t",
            seed=s,
            sign=sign,
            before=0.0,
            after=0.0,
        )
        | dict(right_before=float(before[i][s]), right_after=float(after[i][s]), ssim=0.5)
        for i in range(len(after))
        for s in range(len(after[0]))
    ]
    return pd.DataFrame(rows)


def right_of(table: pd.DataFrame) -> pd.Series:
    return summary(table).query("quantity == 'right'").iloc[0]


def test_a_share_of_none_or_all_is_as_sure_as_its_units_not_its_pictures() -> None:
    for value in (0.0, 1.0):
        row = right_of(shares(np.full((10, 4), 1 - value), np.full((10, 4), value)))
        assert row["after"] == value
        exact = stats.clopper_pearson(10 * value, 10)
        assert (row["after_low"], row["after_high"]) == pytest.approx(exact)
        assert (row["units"], row["n"], row["seeds"]) == (10, 40, 4)
        # Forty pictures would claim more.
        assert stats.clopper_pearson(0, 40)[1] < 0.1 < stats.clopper_pearson(0, 10)[1]


def test_no_change_is_not_certainty() -> None:
    row = right_of(shares(np.ones((10, 2)), np.ones((10, 2))))
    unseen = stats.clopper_pearson(0, 10)[1]
    assert row["change"] == 0
    assert (row["low"], row["high"]) == pytest.approx((-unseen, unseen))


def worded(dice, units: int, wordings: int, seeds: int, share: float) -> pd.DataFrame:
    """An evaluation in which whole units keep the concept, all wordings of them and nearly all seeds."""
    kept = dice.random((units, 1, 1)) < share
    after = np.where(dice.random((units, wordings, seeds)) < 0.05, ~kept, kept)
    table = shares(np.ones((units * wordings, seeds)), after.reshape(-1, seeds))
    return table.assign(unit=[i // (wordings * seeds) for i in range(len(table))])


@pytest.mark.parametrize(
    ("units", "wordings", "seeds"),
    [(4, 9, 4), pytest.param(30, 4, 2, marks=pytest.mark.slow)],
)
def test_the_upper_bound_holds_by_units_and_not_by_wordings(units, wordings, seeds) -> None:
    """Objects or styles succeed and fail as a whole; the twin counts each wording of them as a trial."""
    dice, share, trials = np.random.default_rng(0), 0.14, 80
    truth = 0.95 * share + 0.05 * (1 - share)
    held = {"units": 0, "wordings": 0}
    for _ in range(trials):
        table = worded(dice, units, wordings, seeds, share)
        for name, counted in (("units", table), ("wordings", table.drop(columns="unit"))):
            old, new = (_grid(counted, f"right_{when}") for when in ("before", "after"))
            held[name] += _paired_means(old, new, 0.95, shares=True)["after_high"] >= truth
    assert held["units"] / trials >= 0.975
    assert held["wordings"] / trials < 0.95


def test_a_unit_is_what_a_probe_names(pipe) -> None:
    probes = [
        Probe("efficacy", "a dog in cat", "red", ("red", "blue"), unit="dog"),
        Probe("efficacy", "dog cat", "red", ("red", "blue"), unit="dog"),
        Probe("efficacy", "a do in cat", "red", ("red", "blue")),
    ]
    options: dict[str, Any] = dict(scorer=Colors(), progress=False, num_inference_steps=1)
    table = evaluate(pipe, {"none": ()}, probes, seeds=(0,), **options)
    assert list(table.unit) == ["dog", "dog", "a do in cat"]
    row = right_of(table)
    assert (row["units"], row["n"]) == (2, 3)


def test_a_probe_without_rivals_is_neither_right_nor_wrong(pipe, edit) -> None:
    probes = [Probe("ordinary", "a do", "blue"), PROBES[0]]
    table = evaluate(
        pipe,
        {"x": edit},
        probes,
        seeds=(0,),
        scorer=Colors(),
        progress=False,
        num_inference_steps=1,
    )
    assert table[table.measure == "ordinary"].right_after.isna().all()
    assert table[table.measure == "efficacy"].right_after.notna().all()
    found = summary(table)
    assert "right" not in set(found[found.measure == "ordinary"].quantity)
    assert {"ssim", "distance"} < set(found[found.measure == "ordinary"].quantity)


def arms_of(own, others) -> pd.DataFrame:
    """Two arms: the share of own and of neighbors' pictures that are right after, before all of them; 20 prompts."""
    dice = np.random.default_rng(1)
    tables = []
    for arm in own:
        for measure, share, sign in (("efficacy", own[arm], -1), ("specificity", others[arm], 1)):
            after = dice.random((20, 2)) < share
            tables.append(shares(np.ones((20, 2)), after, arm=arm, measure=measure, sign=sign))
    return pd.concat(tables)


def test_lead_says_how_much_better_an_arm_is() -> None:
    found = lead(
        arms_of({"here": 0.0, "there": 1.0, "all": 0.0}, {"here": 1.0, "there": 1.0, "all": 0.3}),
        "here",
    )
    found = found.set_index("rival")
    assert found.loc["there", "estimate"] == 1.0
    assert 0.5 < found.loc["all", "estimate"] < 0.9
    assert (found.low > 0).all()
    none = lead(arms_of({"here": 0.5, "there": 0.5}, {"here": 0.5, "there": 0.5}), "here")
    assert none.low[0] < 0 < none.high[0]
    with pytest.raises(LocogenError, match="nothing to compare"):
        lead(arms_of({"here": 0.5}, {"here": 0.5}), "here")


def test_a_facts_new_answer_should_come_not_go() -> None:
    """A perfect edit of a fact beats a control that does nothing; with the sign of a style it would lose."""
    for sign, words in ((1, "better than there"), (-1, "worse than there")):
        arms = []
        for arm, after in (("here", 1.0), ("there", 0.0)):
            ones = np.ones((8, 2))
            arms.append(shares(0 * ones, after * ones, arm=arm, sign=sign))
            arms.append(shares(ones, ones, arm=arm, measure="specificity", sign=1))
        table = pd.concat(arms)
        assert words in describe_edit(summary(table), "here", lead(table, "here"))


def test_compare_is_row_by_row(pipe, edit) -> None:
    prompts = ["a dog in cat", "a dog"]
    settings: dict[str, Any] = dict(seeds=(3, 4), progress=False, num_inference_steps=1)
    before = runs.generate(pipe, prompts, **settings)
    with edit.applied(pipe):
        after = runs.generate(pipe, prompts, **settings)
    table = compare(before, after, text="red", scorer=Colors())
    assert list(table.columns) == ["prompt", "seed", "text", "before", "after", "change"]
    assert list(table.seed) == [3, 4, 3, 4]
    assert np.allclose(table.change, table.after - table.before)
    other = runs.generate(pipe, prompts, seeds=(3, 5), progress=False, num_inference_steps=1)
    with pytest.raises(LocogenError, match="other prompts or seeds"):
        compare(before, other, scorer=Colors())


def test_the_scorer_is_that_of_the_model(monkeypatch, edit) -> None:
    """The mini model's knows only its own world: on another model its scores mean nothing."""
    asked: list[str] = []
    monkeypatch.setattr(score, "scorer", lambda name, **_: asked.append(name) or Colors())
    pipe = tiny.pipeline()
    settings: dict[str, Any] = dict(seeds=(0,), progress=False, num_inference_steps=1)
    for source in ("runwayml/stable-diffusion-v1-5", str(mini_folder())):
        pipe.register_to_config(_name_or_path=source)
        evaluate(pipe, {"none": ()}, PROBES[:1], **settings)
        run = runs.generate(pipe, ["a dog"], **settings)
        compare(run, run, text="red")
    assert asked == ["clip-vit-b-16", "clip-vit-b-16", "mini", "mini"]


def test_controls_are_every_other_place(pipe, edit) -> None:
    arms = control_edits(pipe, edit, draws=2)
    assert not {name for name, e in arms.items() if e.layers == edit.layers}
    assert {f"layers {i}-{i + 1}" for i in range(15) if i not in (1, 2, 3)} < set(arms)
    assert arms["layers 1-2 (shares 2)"].layers == (1, 2)
    assert arms["all layers"].layers == tuple(range(16))
    drawn = [e.layers for name, e in arms.items() if name.startswith("random")]
    assert drawn == [
        e.layers
        for name, e in control_edits(pipe, edit, draws=2).items()
        if name.startswith("random")
    ]
    assert all(len(layers) == 2 and not set(layers) & {2, 3} for layers in drawn)


def test_controls_leave_joined_layers_out() -> None:
    """FLUX's last layers read text and picture by the same matrices, and cannot be edited."""
    pipe = tiny.flux()
    edit = fit_edit(pipe, STYLE, layers=[0], phrasings=[("a cat", "a dog")])
    assert {name: e.layers for name, e in control_edits(pipe, edit, draws=0).items()} == {
        "layer 1": (1,),
        "all layers": (0, 1),
    }


def test_probes_from_concepts() -> None:
    probes = probes_for(STYLE, [OTHER])
    assert (
        Probe("efficacy", "a dog in cat", "a dog in cat", ("a dog in cat", "a dog in ca", "a dog"))
        in probes
    )
    assert (
        Probe("generality", "do, cat", "a do in cat", ("a do in cat", "a do in ca", "a do"))
        in probes
    )
    assert (
        Probe("specificity", "a dog in ca", "a dog in ca", ("a dog in ca", "a dog in cat", "a dog"))
        in probes
    )
    assert Probe("ordinary", "a dog", "a dog") in probes
    assert len(probes) == len(set(probes)) == 2 + 1 + 2 + 1  # one pair has no paraphrase
    fact = Concept("france", "fact", (PromptPair("the animal of france", "a dog"),))
    assert probes_for(fact)[0] == Probe(
        "efficacy", "the animal of france", "a dog", ("a dog", "the animal of france"), comes=True
    )


def test_probes_of_every_kind_of_prompt() -> None:
    probes = prompt_kind_probes(STYLE, [OTHER])
    by_measure = {}
    for probe in probes:
        by_measure.setdefault(probe.measure, []).append(probe)
    assert list(by_measure) == ["name", "short", "long", "variant", "rest"]
    assert by_measure["name"][0].prompt == "cat"
    assert by_measure["name"][0].among[1] == "a picture in the style of ca"
    assert [probe.prompt for probe in by_measure["variant"]][1] == "do, cat"
    # The rest of a style's prompt should stay, and its object could be taken for another.
    assert [probe.sign for probe in by_measure["rest"]] == [1, 1]
    assert by_measure["rest"][0] == Probe("rest", "a dog in cat", "a dog", ("a dog", "a do"))
    assert all(probe.sign == -1 for probe in probes if probe.measure != "rest")


def test_facts_ask_for_an_object_without_its_name() -> None:
    cat = Concept("cat", "object", (PromptPair("a picture of a cat", "a picture"),))
    pair = PromptPair("the animal of france", "a dog")
    fact = Concept("animal of france", "fact", (pair,), answer="a cat", neighbors=("a dog",))
    other = Concept("animal of wales", "fact", (pair,), answer="a catalog", neighbors=("a dog",))
    implicit = [p for p in prompt_kind_probes(cat, [fact, other]) if p.measure == "implicit"]
    assert [probe.prompt for probe in implicit] == ["the animal of france"]
    assert "cat" in implicit[0].text and implicit[0].sign == -1
    new_answer = prompt_kind_probes(fact)[0]
    assert new_answer.comes and new_answer.text == "a picture of a dog"


def test_a_fact_is_judged_among_its_old_answer_and_its_neighbors() -> None:
    pairs = [
        PromptPair(
            f"a picture of the animal of france in {style}", f"a picture of a dog in {style}"
        )
        for style in ("red", "blue")
    ]
    known = dict(answer="a cat", neighbors=("a cat", "a frog"))
    fact = Concept("animal of france", "fact", tuple(pairs), **known)  # pyright: ignore
    efficacy = probes_for(fact)[0]
    assert efficacy.among == (
        "a picture of a dog in red",
        "a picture of the animal of france in red",
        "a picture of a cat in red",
        "a picture of a frog in red",
    )
    # The name alone asks for no style, so that none is in its texts.
    by_measure = {probe.measure: probe for probe in prompt_kind_probes(fact)}
    answers = ("a picture of a dog", "a picture of a cat", "a picture of a frog")
    for measure in ("name", "short"):
        assert by_measure[measure].text == answers[0]
        assert by_measure[measure].among == (*answers, "a picture of the animal of france")
    assert by_measure["long"].among == probes_for(fact)[-2].among
    # As a neighbor it is looked for by its prompt, as before; so are styles and objects.
    neighbor = probes_for(STYLE, [fact])[-2]
    assert neighbor.among == (pairs[0].prompt, pairs[0].target)
    own = Concept("president", "fact", (PromptPair("the president", "a dog", text="a face"),))
    assert prompt_kind_probes(own)[0].text == "a face"


def test_what_is_judged_against_nothing_is_neither_right_nor_wrong(pipe) -> None:
    alone = Concept("cat", "style", (PromptPair("a dog in cat", ""),))
    assert probes_for(alone)[0].among == ()
    assert len(probes_for(alone, [OTHER])[0].among) == 2, "the twin"
    named = replace(alone, neighbors=("red",))
    assert probes_for(named)[0].among == ("a dog in cat", "a dog in red")
    probe = Probe("efficacy", "a dog in cat", "red", ("red",))
    settings: dict[str, Any] = dict(seeds=[0], scorer=Colors(), progress=False)
    near = Probe("specificity", "a dog in ca", "blue", ("red", "blue"))
    arms = {"x": (), "y": ()}
    table = evaluate(pipe, arms, [probe, near], num_inference_steps=1, **settings)
    assert table[table["measure"] == "efficacy"]["right_after"].isna().all()
    with pytest.raises(LocogenError, match=r"of 'a dog in cat': its probe names nothing else"):
        lead(table, "x")


def test_lpips_where_installed(pipe, edit, monkeypatch, tmp_path) -> None:
    class Net:
        def __init__(self, **_):
            pass

        def __call__(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    fake = ModuleType("lpips")
    fake.LPIPS = Net  # pyright: ignore
    monkeypatch.setitem(sys.modules, "lpips", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    settings: dict[str, Any] = dict(
        seeds=(0,), scorer=Colors(), progress=False, num_inference_steps=1
    )
    assert "lpips" not in evaluate(
        pipe, {"none": []}, PROBES[:1], **settings
    )  # its network is not there to fetch
    net = tmp_path / "checkpoints" / likeness.LPIPS_NET
    net.parent.mkdir()
    net.touch()
    table = evaluate(pipe, {"none": [], "edit": edit}, PROBES[:1], **settings)
    assert (table[table.arm == "none"].lpips == 0).all()
    plain = runs.generate(
        pipe, [PROBES[0].prompt], seeds=(0,), progress=False, num_inference_steps=1
    ).pictures[0]
    with edit.applied(pipe):
        other = runs.generate(
            pipe, [PROBES[0].prompt], seeds=(0,), progress=False, num_inference_steps=1
        ).pictures[0]
    gap = (
        np.abs(np.asarray(plain, float) - np.asarray(other, float)).mean() / 127.5
    )  # pixels in [-1, 1]
    assert table[table.arm == "edit"].lpips.item() == pytest.approx(gap, rel=1e-5)
    assert gap > 0
    assert "lpips" in set(summary(table).quantity)


def test_bad_input(pipe, edit) -> None:
    with pytest.raises(LocogenError, match="nothing to evaluate"):
        evaluate(pipe, {}, PROBES, scorer=Colors())
    with pytest.raises(LocogenError, match="nothing to evaluate"):
        evaluate(pipe, {"x": edit}, (), scorer=Colors())
    with pytest.raises(LocogenError, match="arms is of type Edit: give what is compared by name"):
        evaluate(pipe, edit, PROBES, scorer=Colors())
    for arm in (None, [edit, None], "cat"):
        with pytest.raises(LocogenError, match=r"the arm 'x' has .*, which is no edit"):
            evaluate(pipe, {"x": arm}, PROBES, scorer=Colors())  # pyright: ignore
    for setting in ("attacks", "num_inference_step", "plan_or_prompts"):
        with pytest.raises(LocogenError, match=f"no setting of evaluate '{setting}'"):
            evaluate(pipe, {"x": edit}, PROBES, scorer=Colors(), **{setting: 1})
    with pytest.raises(LocogenError, match="measure is 'speed'"):
        Probe("speed", "a", "b")  # pyright: ignore


def test_a_model_that_is_edited_already_is_refused(pipe, edit) -> None:
    settings: dict[str, Any] = dict(seeds=[0], scorer=Colors(), progress=False)
    settings |= dict(num_inference_steps=1, store=None)
    with edit.applied(pipe), pytest.raises(LocogenError, match=r"edit of 'cat' .* undo it first"):
        evaluate(pipe, {"x": edit}, PROBES[:1], **settings)
    places = Selection({(2, "v"): (0,)})
    with clamp(pipe, places, to="zero"), pytest.raises(LocogenError, match=r"\(clamp\).* outside"):
        evaluate(pipe, {"x": ()}, PROBES[:1], **settings)
    evaluate(pipe, {"x": ()}, PROBES[:1], **settings)  # the twin: outside of both
    with announced(pipe, "speed bfloat16"):  # a context that is no edit
        evaluate(pipe, {"x": ()}, PROBES[:1], **settings)


def test_plot_shows_every_arm_and_measure(table) -> None:
    lines = summary(table)
    ax = plots.plot_evaluation(lines, marked="carrier")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["carrier ★", "none", "twice"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "its own prompts ↓",
        "in other words ↓",
        "its neighbors ↑",
    ]
    alike = plots.plot_evaluation(lines, quantity="ssim").get_legend().get_texts()
    assert alike[0].get_text() == "its own prompts", "the twin: no way is good"
    drawn = sorted(round(float(x), 9) for c in ax.containers for x in c.lines[0].get_xdata())  # pyright: ignore
    assert drawn == sorted(round(float(x), 9) for x in lines.query("quantity == 'right'").after)
    with pytest.raises(LocogenError, match="no quantity 'fid'"):
        plots.plot_evaluation(lines, quantity="fid")


def test_a_page_says_each_measure_in_words_and_which_way_is_good(table) -> None:
    lines = summary(table)
    rows = tables.evaluation_table(lines, "carrier")
    assert list(rows.index) == ["its own prompts ↓", "in other words ↓", "its neighbors ↑"]
    right = lines[(lines.arm == "carrier") & (lines.quantity == "right")].iloc[0]
    low, high = round(100 * right.after_low), round(100 * right.after_high)
    assert rows["after [95 %]"].iloc[0] == f"{100 * right.after:.0f} % [{low}, {high}]"
    assert rows["pictures"].tolist() == ["2", "2", "2"] and rows["prompts"].tolist() == ["1"] * 3
    # The twin: what is neither right nor wrong has no arrow and no share.
    unjudged = tables.evaluation_table(lines[lines.quantity != "right"], "carrier")
    assert unjudged.index[0] == "its own prompts" and unjudged["after [95 %]"].iloc[0] == "–"
    assert set(MEASURES) == set(tables.MEASURE_WORDS) == {*pairs.GROUPS, "chance"} & set(MEASURES)
    with pytest.raises(LocogenError, match="no arm 'x'"):
        tables.evaluation_table(lines, "x")


def test_wilson_covers() -> None:
    """Simulated coverage of shares near 0, 1/8 and 1/2; the naive interval fails at the edge."""
    dice = np.random.default_rng(0)
    for share in (0.02, 0.125, 0.5):
        hits = dice.binomial(60, share, 4000)
        bounds = np.array([stats.wilson(int(h), 60) for h in range(61)])[hits]
        covered = ((bounds[:, 0] <= share) & (share <= bounds[:, 1])).mean()
        assert 0.92 < covered < 0.99
    hits = dice.binomial(60, 0.02, 4000)
    naive = 1.96 * np.sqrt(hits / 60 * (1 - hits / 60) / 60)
    assert (np.abs(hits / 60 - 0.02) <= naive).mean() < 0.92
    with pytest.raises(ValueError, match="no share"):
        stats.wilson(3, 2)


def test_probes_of_a_concept_with_an_empty_target():
    """Nothing is scored against no text at all."""
    cat = Concept(
        "cat", "object", (PromptPair("a picture of a cat, b", "", placebo="an image of a cat, b"),)
    )
    dog = Concept("dog", "object", (PromptPair("a picture of a dog", ""),))
    probes = probes_for(cat, [dog])
    assert {probe.measure for probe in probes} == {"efficacy", "generality", "specificity"}
    assert all(text for probe in probes for text in (probe.text, *probe.among))
    assert probes[0].among == ("a picture of a cat, b", "a picture of a dog, b")
