"""Editors by name: each is what its name says, and can be applied."""

import pandas as pd
import pytest
from support import tiny

from locogen.editing.edit import Edit, fit_edit
from locogen.editing.rivals.choosing import best_arm, editor_settings
from locogen.editing.rivals.editors import ClampedNeurons, edit_with, editors
from locogen.errors import LocogenError
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import generate
from locogen.plan import Concept, PromptPair

CAT = Concept(
    "cat", "style", (PromptPair("a dog in cat", "a dog"), PromptPair("a do in cat", "a do"))
)
GIVEN = {
    "layers": [1],
    "preserve": ["a dog", "a do", "x, y"],
    "ordinary": ["a dog", "do"],
    "num_inference_steps": 2,
}


@pytest.fixture(scope="module")
def pipe():
    # Wide enough for the published number of neurons.
    return tiny.pipeline(block_out_channels=(64, 64, 64, 64))


@pytest.mark.parametrize(
    "editor", tiny.fast("LocoEdit", "null space", "steering", "neurons", of=editors())
)
def test_every_editor_changes_pictures_and_leaves_nothing(pipe, editor) -> None:
    def picture():
        run = generate(pipe, ["a dog in cat"], num_inference_steps=2, progress=False)
        return run.pictures[0].tobytes()

    before = fingerprint(pipe)
    plain = picture()
    edited = edit_with(editor, pipe, CAT, **GIVEN)
    assert picture() == plain
    with edited.applied(pipe):
        assert picture() != plain
    assert fingerprint(pipe) == before


def test_names_say_where_and_what_is_edited(pipe) -> None:
    layers = {}
    for editor in ("LocoEdit", "all layers", "random layers", "UCE", "SPEED"):
        edit = edit_with(editor, pipe, CAT, **GIVEN)
        assert isinstance(edit, Edit)
        layers[editor] = edit.layers
    assert layers["LocoEdit"] == (1,)
    assert layers["all layers"] == layers["UCE"] == layers["SPEED"]
    assert set(layers["random layers"]) < set(layers["all layers"]) - {1}
    loco = edit_with("LocoEdit", pipe, CAT, tokens="end", **GIVEN)
    same = fit_edit(pipe, CAT, layers=[1], tokens="end")
    assert loco.recipe["options"] == same.recipe["options"]


def test_mistakes_are_named(pipe) -> None:
    with pytest.raises(LocogenError, match="no editor 'mine'"):
        edit_with("mine", pipe, CAT, layers=[1])
    with pytest.raises(LocogenError, match="preserve="):
        edit_with("UCE", pipe, CAT, layers=[1])
    with pytest.raises(LocogenError, match="ordinary="):
        edit_with("covariance", pipe, CAT, layers=[1])
    with pytest.raises(LocogenError, match="strength is 2"):
        edit_with("neurons", pipe, CAT, layers=[1]).applied(pipe, 2)


ONE = {"layers": [1], "num_inference_steps": 1}


@pytest.mark.parametrize(
    ("editor", "options", "says"),
    [
        ("random layers", {"layers": [1, 99]}, "no layers .99."),
        ("all layers", {"layers": [99]}, "no layers .99."),
        ("neurons", {"layers": []}, "layers is empty"),
        ("LocoEdit", {"riddge": 1}, "no option of LocoEdit 'riddge': did you mean 'ridge'"),
        ("LocoEdit", {"pipe2": 1}, "no option of LocoEdit"),
        ("null space", {"preserve": ["a do"], "null_space": False}, "leave null_space= out"),
        ("steering", {"tokens": "end"}, "steering is no edit of matrices and takes no tokens"),
        ("neurons", {"number": 65}, "number is 65: .* from 1 to 64"),
        ("neurons", {"number": 0}, "number is 0"),
        ("neurons", {"number": True}, "number is True"),
        ("AdaVD", {"threshold": "0.8"}, "threshold is '0.8': give a finite number"),
        ("UCE", {"preserve": [1]}, "preserve holds something of type int"),
        ("covariance", {"ordinary": [CAT]}, "ordinary holds something of type Concept"),
    ],
)
def test_what_an_editor_cannot_take_is_named(pipe, editor, options, says) -> None:
    with pytest.raises(LocogenError, match=says):
        edit_with(editor, pipe, CAT, **(ONE | options))


@pytest.mark.parametrize("editor", ["LocoEdit", "steering", "AdaVD", "neurons"])
def test_a_name_is_no_concept_and_several_concepts_are_for_edits_of_matrices(pipe, editor) -> None:
    with pytest.raises(LocogenError, match=r"concept is .cat.: give one Concept, as from concept"):
        edit_with(editor, pipe, "cat", **ONE)
    if editor == "LocoEdit":
        assert edit_with(editor, pipe, [CAT], **ONE).layers == (1,)
        return
    with pytest.raises(LocogenError, match="concept is a list: give one Concept"):
        edit_with(editor, pipe, [CAT], **ONE)


def test_layers_count_once_and_may_be_missing_where_they_are_ignored(pipe) -> None:
    twice = edit_with("random layers", pipe, CAT, layers=[1, 1, 2])
    assert twice.layers == edit_with("random layers", pipe, CAT, layers=[1, 2]).layers
    assert len(twice.layers) == 2
    with pytest.raises(LocogenError, match="7 other layers to draw 9 from: edit fewer layers"):
        edit_with("random layers", pipe, CAT, layers=range(9))
    with pytest.raises(LocogenError, match=r"0 other layers .* no layer can be edited"):
        edit_with("random layers", tiny.FAMILIES["z-image"](), CAT, layers=[0])
    every = edit_with("all layers", pipe, CAT, layers=[])
    assert len(every.layers) == 16


@pytest.mark.parametrize("editor", ["LocoEdit", "steering", "AdaVD"])
@pytest.mark.parametrize("strength", [float("nan"), "1"])
def test_a_strength_is_a_finite_number(pipe, editor, strength) -> None:
    edit = edit_with(editor, pipe, CAT, **ONE)
    with (
        pytest.raises(LocogenError, match=r"strength is '?(nan|1)'?: give a finite number"),
        edit.applied(pipe, strength),
    ):
        pass


def test_neurons_say_their_share_and_come_back_from_their_file(pipe, tmp_path) -> None:
    clamped = edit_with("neurons", pipe, CAT, layers=[1, 2], number=16)
    assert set(clamped.shares.values()) == {0.25} and len(clamped.shares) == 4
    assert "25 % to 25 %" in clamped._repr_html_()
    usual = edit_with("neurons", pipe, CAT, layers=[1])
    assert usual.shares == {(1, "k"): 50 / 64, (1, "v"): 50 / 64}  # as published, by default
    clamped.save(tmp_path / "neurons.safetensors")
    loaded = ClampedNeurons.load(tmp_path / "neurons.safetensors")
    assert loaded.selection.channels == clamped.selection.channels

    def picture(neurons):
        with neurons.applied(pipe):
            run = generate(pipe, ["a dog in cat"], num_inference_steps=1, progress=False)
        return run.pictures[0].tobytes()

    assert picture(loaded) == picture(clamped) != picture(usual)
    (tmp_path / "other").write_bytes(b"")
    with pytest.raises(LocogenError, match="no neurons"):
        ClampedNeurons.load(tmp_path / "other")


@pytest.mark.parametrize(
    "editor", tiny.fast("LocoEdit", "AdaVD", "steering", "neurons", of=editors())
)
def test_every_setting_to_choose_among_can_be_asked_for(pipe, editor) -> None:
    settings = editor_settings(editor)
    assert settings
    edits = []
    for options in settings.values():
        try:
            edits.append(edit_with(editor, pipe, CAT, **(GIVEN | options)))
        except LocogenError as error:  # a null space may leave nothing: never an unknown option
            assert "cannot change anything" in str(error)
    assert edits


def test_settings_are_of_known_editors_and_nobody_elses() -> None:
    with pytest.raises(LocogenError, match="did you mean"):
        editor_settings("LocoEdits")
    editor_settings("LocoEdit")["end, 1"]["ridge"] = 5.0
    assert editor_settings("LocoEdit")["end, 1"]["ridge"] == 1.0


def line(arm: str, measure: str, change: float, low: float, high: float, sign: int = -1):
    shares = {"change": change, "after_low": low, "after_high": high, "sign": sign}
    return {"quantity": "right", "arm": arm, "measure": measure} | shares


def test_the_best_arm_trades_what_is_left_for_what_neighbors_lose_a_point_for_a_point() -> None:
    strong = line("strong", "efficacy", -1.0, 0.0, 0.2)
    weak = line("weak", "efficacy", -0.8, 0.1, 0.5)
    for loss, best in ((0.29, "strong"), (0.31, "weak")):
        losses = [
            line("strong", "specificity", -loss, 0.0, 1.0, 1),
            line("weak", "specificity", 0.0, 0.0, 1.0, 1),
        ]
        assert best_arm(pd.DataFrame([strong, weak, *losses])) == best
    # What neighbors win counts for nothing, or an edit could buy itself free.
    won = line("weak", "specificity", 0.9, 0.0, 1.0, 1)
    assert best_arm(pd.DataFrame([strong, weak, won])) == "strong"


def test_of_a_fact_what_is_left_is_what_does_not_show_the_new_answer() -> None:
    good = line("good", "efficacy", 0.9, 0.7, 1.0, sign=1)
    poor = line("poor", "efficacy", 0.2, 0.1, 0.6, sign=1)
    assert best_arm(pd.DataFrame([poor, good])) == "good"
    # The before twin: were the sign not looked at, the poor one would be left less often.
    assert best_arm(pd.DataFrame([poor | {"sign": -1}, good | {"sign": -1}])) == "poor"


def test_an_arm_without_shares_is_named() -> None:
    cosines = line("cosines", "efficacy", 0, 0, 0) | {"quantity": "score"}
    with pytest.raises(LocogenError, match="cosines"):
        best_arm(pd.DataFrame([line("shares", "efficacy", -1.0, 0.0, 0.2), cosines]))
