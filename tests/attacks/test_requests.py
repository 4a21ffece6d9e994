"""What an attack is asked for: what contradicts itself is refused before anything is made."""

import contextlib
import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from locogen import console
from locogen.attacks import goal as goals
from locogen.attacks.attack import attack
from locogen.attacks.goal import NeverHad, learned_and_judged
from locogen.attacks.harden import harden
from locogen.attacks.inpainting import cropped, smallest_hole
from locogen.attacks.kinds import LEARNING, steps_and_stops
from locogen.attacks.loss import check_attackable
from locogen.attacks.result import Attack
from locogen.editing.edit import fit_edit
from locogen.editing.probes import Probe
from locogen.errors import LocogenError
from locogen.plan import Concept, PromptPair

FEW = {"num_inference_steps": 2, "guidance_scale": 1.0, "progress": False}
PAIRS = tuple(PromptPair(f"{word} in cat", word) for word in ("a dog", "a do", "go", "od"))
CAT = Concept("cat", "style", PAIRS, neighbors=("ca",))
RED = Probe("efficacy", "dog of cat", "red", ("blue",))
SHOWN = (Image.new("RGB", (16, 16), (200, 0, 0)),)


class Reds:
    """A scorer of red, whatever the text is."""

    settings: ClassVar = {"scorer": "reds"}

    def __call__(self, pictures, *texts):
        reds = np.array([np.asarray(picture, float)[..., 0].mean() / 255 for picture in pictures])
        return [reds if line[0].endswith("cat") else np.full(len(reds), 0.5) for line in texts]


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def edit(pipe):
    return fit_edit(pipe, CAT, layers=[0, 1], ridge=0.1)


@pytest.fixture
def made(monkeypatch):
    """Prompts that pictures were made of."""
    prompts: list[str] = []
    generate = goals.generate

    def noting(pipe, given, **options):
        prompts.extend(given)
        return generate(pipe, given, **options)

    monkeypatch.setattr(goals, "generate", noting)
    return prompts


def attacked(pipe, edit, kind="inversion", **options):
    given = {"seeds": [0], "scorer": Reds(), "models": ["edited"], **FEW} | options
    return attack(pipe, CAT, edit, kind=kind, **given)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        # where it is judged
        ({"at": [0.5]}, r"at is 0\.5: give a whole number"),
        ({"at": "12"}, "at is '12': give a list"),
        ({"at": 3}, "at is 3: give a list"),
        ({"at": []}, r"at is \[\]: give a list"),
        ({"at": [5], "steps": 1}, r"steps is 1, and at is \(5,\)"),
        ({"at": [1, 2], "steps": 50}, "leave out steps="),
        ({"kind": "relearn", "at": [1, 2]}, "judged by numbers of pictures="),
        ({"kind": "noise", "at": [3]}, "'noise' is judged once"),
        ({"kind": "closed", "at": [3]}, "'closed' is judged once"),
        ({"kind": "discrete", "at": [3]}, "'discrete' is judged once"),
        ({"kind": "inpaint", "at": [0]}, "percent of the sides, from 13 up to 100"),
        ({"kind": "inpaint", "at": [1]}, "from 13 up to 100"),
        ({"kind": "inpaint", "at": [0.5]}, r"at is 0\.5"),
        ({"kind": "completion", "at": [2]}, "from 0 up to 1"),
        # numbers
        ({"strength": "x"}, "strength is 'x'"),
        ({"strength": None}, "strength is None"),
        ({"rate": "x"}, "rate is 'x'"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"steps": True}, "steps is True"),
        ({"vectors": True}, "vectors is True"),
        ({"vectors": np.array([1, 2])}, "vectors is array"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"seed": 2**50}, "seed is 1125899906842624: give a whole number from"),
        ({"exhaustive": "no"}, "exhaustive is 'no'"),
        ({"kind": "relearn", "pictures": 1}, "pictures is 1: give a list"),
        ({"kind": "relearn", "pictures": (1.5,)}, r"pictures is 1\.5"),
        ({"kind": "relearn", "pictures": (1, 1)}, "give each number once"),
        # things
        ({"kind": ["noise"]}, "kind is"),
        ({"models": "edited"}, "models is 'edited': use a list"),
        ({"models": ["edited", "edited"]}, "give each model once"),
        ({"models": []}, r"models is \[\]"),
        ({"kind": "discrete", "vocabulary": [3]}, r"vocabulary is \[3\]"),
        ({"kind": "discrete", "vocabulary": []}, r"vocabulary is \[\]"),
        ({"kind": "discrete", "vocabulary": 3}, "vocabulary is 3"),
        ({"kind": "discrete", "vocabulary": ["xyz"]}, "one token each"),
        ({"kind": "discrete", "exhaustive": True, "vectors": 9}, "more than 200000"),
        ({"folder": 3}, "folder is 3"),
        ({"training": []}, r"training is \[\]"),
        ({"training": ["a dog in cat"]}, "list of prompt pairs"),
        ({"training": [PromptPair("a dog", "dog")]}, "does not name 'cat'"),
        ({"held_out": []}, r"held_out is \[\]"),
        ({"held_out": ["a dog in cat"]}, "list of Probe"),
        # settings
        ({"foo": 1}, "no setting of attack 'foo'"),
        ({"negative_prompt": "x"}, "no setting of attack 'negative_prompt'"),
        ({"store": "x"}, "folder="),
        ({"num_inference_steps": "x"}, "num_inference_steps is 'x'"),
        ({"guidance_scale": "x"}, "guidance_scale is 'x'"),
        # what would fail after the edited model was attacked
        (
            {
                "models": ["edited", "never had"],
                "held_out": [RED],
                "never_had": NeverHad(SHOWN, name="zyx"),
            },
            "lacks 'cat'",
        ),
        (
            {
                "kind": "inpaint",
                "models": ["edited", "never had"],
                "never_had": NeverHad(SHOWN, name="zyx"),
            },
            "pictures of the held-out prompts",
        ),
        (
            {
                "kind": "relearn",
                "models": ["edited", "never had"],
                "never_had": NeverHad(SHOWN, name="zyx"),
            },
            "never_had has 1 pictures",
        ),
    ],
)
def test_it_is_refused_before_anything_is_made(pipe, edit, made, wrong, words) -> None:
    with pytest.raises(LocogenError, match=words):
        attacked(pipe, edit, **wrong)
    assert not made


def test_what_is_not_refused_makes_pictures(pipe, edit, made) -> None:
    """The twin; NumPy's numbers are numbers, and the file holds them."""
    given = {"strength": np.float32(0.5), "rate": np.float32(0.1), "seed": np.int64(2)}
    tried = attacked(pipe, edit, steps=np.int64(1), batch=1, **given, seeds=np.arange(1))
    assert made
    assert [type(tried.settings[name]) for name in given] == [float, float, int]


def test_it_comes_back_from_a_file_with_numpys_numbers(pipe, edit, tmp_path) -> None:
    numbers: dict[str, Any] = {"strength": np.float32(0.5), "ridge": np.float32(0.2)}
    tried = attacked(pipe, edit, "closed", **numbers, num_inference_steps=np.int64(1))
    tried.save(tmp_path / "tried.safetensors")
    assert Attack.load(tmp_path / "tried.safetensors").settings["strength"] == 0.5


@pytest.mark.parametrize(
    ("kind", "steps", "at", "expected"),
    [
        ("inversion", None, None, (200, (0, 200))),
        ("inversion", None, [25, 0], (25, (0, 25))),
        ("inversion", 30, [30], (30, (30,))),
        ("states", 0, None, (0, (0,))),
        ("relearn", None, None, (100, (100,))),
        ("completion", 5, None, (0, (0, 5, 10, 15))),
        ("inpaint", None, None, (0, (50, 75))),
        ("noise", None, None, (0, (0,))),
    ],
)
def test_training_ends_where_it_is_judged_last(pipe, kind, steps, at, expected) -> None:
    assert steps_and_stops(pipe, kind, steps, at, 20) == expected


def test_the_smallest_hole_has_something_in_it(pipe) -> None:
    picture = Image.new("RGB", (64, 64))
    least = smallest_hole(pipe)
    cropped(least / 100)(picture)
    edge = round(8 * (1 - least / 100) / 2)  # of eight latents
    assert 8 - 2 * edge >= 1
    assert 8 - 2 * round(8 * (1 - (least - 1) / 100) / 2) < 1  # the twin


# --- a model, a folder, a control -----------------------------------------------------------------


def test_a_model_that_gradients_do_not_pass_is_refused(edit) -> None:
    half = tiny.pipeline()
    check_attackable(half)  # the twin
    half.unet.to(torch.float16)
    with pytest.raises(LocogenError, match="float16"):
        check_attackable(half)
    with pytest.raises(LocogenError, match="has no text encoder"):
        check_attackable(half.unet)


def test_a_model_that_is_edited_already_is_refused(pipe, edit, made) -> None:
    other = fit_edit(pipe, CAT, layers=[3])
    for applied in (edit, other):
        with applied.applied(pipe):
            for models in (["edited"], ["unedited"]):
                with pytest.raises(LocogenError, match=r"edit of 'cat' is applied .* undo it"):
                    attacked(pipe, edit, "noise", models=models)
            with pytest.raises(LocogenError, match="harden applies edits itself"):
                harden(pipe, CAT, edit, **FEW)
    assert not made
    check_attackable(pipe)  # the twin: it is undone


def test_inference_mode_is_refused_where_something_is_trained(pipe, edit, made) -> None:
    with torch.inference_mode():
        with pytest.raises(LocogenError, match=r"torch\.inference_mode"):
            attacked(pipe, edit, steps=1)
        with pytest.raises(LocogenError, match=r"torch\.inference_mode"):
            harden(pipe, CAT, edit, **FEW)
    assert not made
    with torch.no_grad():  # the twin
        assert len(attacked(pipe, edit, steps=1, batch=1).table)


def test_a_file_in_the_place_of_the_folder_is_named(pipe, edit, made, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(LocogenError, match=r"folder is .* cannot be made one"):
            attacked(pipe, edit, folder=path)
        with pytest.raises(LocogenError, match=r"folder is .* cannot be made one"):
            harden(pipe, CAT, edit, folder=path, **FEW)
    assert not made


@pytest.mark.parametrize("pictures", [("a.png",), "abc", SHOWN[0], 3])
def test_what_is_no_picture_is_refused(pictures) -> None:
    with pytest.raises(LocogenError, match="list of PIL pictures"):
        NeverHad(pictures=pictures, name="zyx")
    assert NeverHad(pictures=list(SHOWN), name="zyx").pictures == SHOWN  # the twin


def test_own_words_are_not_cut(pipe, made) -> None:
    pairs = (PromptPair("go in dog ca", "go"), PromptPair("od in dog ca", "od"))
    two = Concept("dog ca", "style", pairs, neighbors=("ca",))
    edit = fit_edit(pipe, two, layers=[0], ridge=0.1)
    count = len(pipe.tokenizer("dog ca", add_special_tokens=False).input_ids)
    assert count > 1
    given = {"start": "own", "steps": 0, "seeds": [0], "scorer": Reds(), **FEW}
    for call in (attack, harden):
        options = {name: given[name] for name in given if call is attack or name in _OF_HARDEN}
        with pytest.raises(LocogenError, match=f"give vectors={count}"):
            call(pipe, two, edit, **options)
    assert not made
    table = attack(pipe, two, edit, vectors=count, models=["edited"], **given).table
    assert (table["before"] == table["after"]).all()  # no steps change nothing


_OF_HARDEN = {"start", "steps", *FEW}


class NoWeights:
    """Something with `applied` alone."""

    def applied(self, pipe, strength=1.0):
        return contextlib.nullcontext()


def test_what_cannot_be_hardened_is_refused_before_a_training(pipe, edit, made) -> None:
    other = Concept("do", "style", (PromptPair("a dog in do", "a dog"),), neighbors=("ca",))
    bare = dataclasses.replace(edit, recipe={})
    for concept, given, words in [
        ("cat", edit, "harden takes a Concept and an Edit, not str"),
        (CAT, "x", "not Concept and str"),
        (CAT, NoWeights(), "not Concept and NoWeights"),
        (other, edit, "no phrasing about 'do'"),
        (CAT, bare, "no phrasings to put trained words into"),
    ]:
        with pytest.raises(LocogenError, match=words):
            harden(pipe, concept, given, **FEW)
    for wrong in ({"training": ["a dog in cat"]}, {"foo": 1}, {"seed": 1.5}, {"strength": 2}):
        with pytest.raises(LocogenError):
            harden(pipe, CAT, edit, **FEW, **wrong)
    assert not made
    assert harden(pipe, CAT, edit, steps=0, **FEW).recipe["words"]  # the twin


# --- one bar --------------------------------------------------------------------------------------


def shown_by(call, monkeypatch):
    """What the bar says while the call is at work."""
    said: list[str] = []
    show = console.Bar._show

    def noting(bar, **options):
        said.append(str(bar))
        assert bar.line is not None
        show(bar, **options)

    monkeypatch.setattr(console.Bar, "_show", noting)
    call()
    return said


@pytest.mark.parametrize("kind", ["noise", "inversion", "discrete"])
def test_the_bar_says_what_is_done(pipe, edit, monkeypatch, capsys, kind) -> None:
    options: dict[str, Any] = {"progress": True}
    if kind in LEARNING:
        options |= {"steps": 2, "batch": 1}
    said = shown_by(lambda: attacked(pipe, edit, kind, **options), monkeypatch)
    assert "picture 1 of 2" in said
    assert "scoring pictures" in said
    steps = [text for text in said if text.startswith(f"{kind}, edited: step 2 of 2")]
    assert bool(steps) == (kind in LEARNING)
    assert "it/s" not in capsys.readouterr().err  # no other bar


def test_hardening_says_what_is_done(pipe, edit, monkeypatch) -> None:
    options = FEW | {"steps": 2, "batch": 1, "progress": True}
    said = shown_by(lambda: harden(pipe, CAT, edit, **options), monkeypatch)
    assert "picture 1 of 4" in said
    assert any(text.startswith("round 1 of 1: step 2 of 2") for text in said)


# --- learned from, and judged ---------------------------------------------------------------------


def prompts_of(training, held_out, learns=True):
    pairs, probes = learned_and_judged(CAT, training, held_out, learns=learns)
    return [pair.prompt[:-7] for pair in pairs], [probe.prompt[:-7] for probe in probes]


def probe_of(pair):
    return Probe("efficacy", pair.prompt, "red", ("blue",))


def test_no_prompt_is_learned_from_and_judged() -> None:
    assert prompts_of(None, None) == (["a dog", "go"], ["a do", "od"])
    assert prompts_of(PAIRS[:2], None) == (["a dog", "a do"], ["od"])
    assert prompts_of(PAIRS[1::2], None) == (["a do", "od"], ["a dog", "go"])
    assert prompts_of(None, [probe_of(PAIRS[0])]) == (["go"], ["a dog"])
    with pytest.raises(LocogenError, match="judged on others"):
        prompts_of(PAIRS, None)
    with pytest.raises(LocogenError, match="learns from others"):
        prompts_of(None, [probe_of(pair) for pair in PAIRS])
    with pytest.warns(UserWarning, match="'a do in cat' is in training= and in held_out="):
        prompts_of(PAIRS[:2], [Probe("efficacy", "A do in  Cat", "red", ("blue",))])
    # What learns nothing may be judged on all.
    assert prompts_of(PAIRS, None, learns=False)[1] == ["a do", "od"]
    assert prompts_of(PAIRS[:1], [probe_of(PAIRS[0])], learns=False)[1] == ["a dog"]


# --- what it returns ------------------------------------------------------------------------------


def test_the_largest_number_of_pictures_speaks_for_the_attack(pipe, edit) -> None:
    options = {"steps": 3, "batch": 2, "rate": 0.05}
    tried = attacked(pipe, edit, "relearn", pictures=(2, 0), **options)
    assert tried.summary()["strength"].tolist() == [0, 2]
    last = tried.table[tried.table["strength"] == 2]
    assert (tried.evaluation("x")["after"] == last["after"]).all()
    few = tried.table.assign(shown_after=(tried.table["strength"] == 2).astype(float))
    # The sentence is of the larger one, under which alone the concept is shown here.
    assert "and in 2 of 2" in dataclasses.replace(tried, table=few).sentence()
    less = tried.table.assign(shown_after=(tried.table["strength"] == 0).astype(float))
    assert "and in 0 of 2" in dataclasses.replace(tried, table=less).sentence()  # the twin


def test_the_settings_say_what_was_attacked_with_what(pipe, edit) -> None:
    tried = attacked(pipe, edit, "noise", models=["edited", "placebo"], placebo=edit)
    settings = tried.settings
    assert settings["edit"]["name"] == "cat"
    assert settings["edit"] == settings["placebo"]
    other = fit_edit(pipe, CAT, layers=[0, 1], ridge=0.2)
    assert attacked(pipe, other, "noise").settings["edit"] != settings["edit"]  # the twin
    assert [probe["prompt"] for probe in settings["held_out"]] == ["a do in cat", "od in cat"]
    assert settings["neighbors"] == ["ca"]
    assert settings["num_inference_steps"] == 2
    assert settings["batch_size"] == 32  # not asked for
    assert {"locogen", "torch"} < set(settings["versions"])
    assert settings["weights"]
