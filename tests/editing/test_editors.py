"""Editors by name: each is what its name says, and can be applied."""

import pytest
from support import tiny

from locogen.editing.edit import Edit, fit_edit
from locogen.editing.rivals.editors import edit_with, editors
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
