"""Orthogonal values: what a layer reads of a prompt loses the concept's part, and nothing else."""

import dataclasses

import pytest
import torch
from support import tiny

from locogen.editing.rivals.orthogonal_values import (
    OrthogonalValues,
    Shift,
    fit_orthogonal_values,
)
from locogen.errors import LocogenError
from locogen.models.families import family_of
from locogen.models.hooks import after, hooked
from locogen.models.layers import find_layers
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import generate
from locogen.plan import Concept, PromptPair

CAT = Concept(
    "cat", "style", (PromptPair("a dog in cat", "a dog"), PromptPair("a do in cat", "a do"))
)
FEW = {"num_inference_steps": 2, "guidance_scale": 2.0}
PLAIN = {"slope": 0.0, "height": 2.0}  # the orthogonal complement itself


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def values_of(pipe, layer, context=None, prompt="a dog in cat"):
    """The values of a layer in the first call, rows of guidance and of the prompt."""
    seen = []
    matrix = family_of(pipe).matrices(layer.module)["v"]

    def note(module, args, kwargs, output):
        seen.append(output.detach().clone())

    def run():
        # Behind the context's own hook.
        with hooked([after(matrix, note, "values")]):
            generate(pipe, [prompt], progress=False, **FEW)

    if context is None:
        run()
    else:
        with context.applied(pipe):
            run()
    return seen[-2]  # of two steps the first


@pytest.mark.parametrize("layer", [0, 5])
def test_nothing_is_left_along_the_concepts_value(pipe, layer) -> None:
    values = fit_orthogonal_values(pipe, CAT, **PLAIN)
    target = values.values[layer]
    layer = find_layers(pipe)[layer]
    plain = values_of(pipe, layer)
    changed = values_of(pipe, layer, values)
    along = changed[1, 1:] @ target / target.norm()
    before = plain[1, 1:] @ target / target.norm()
    assert along.abs().max() < 1e-5
    assert before.abs().max() > 1e-2  # the twin
    # What is orthogonal to it stays, and so do the start mark and guidance's rows.
    unit = target / target.norm()
    rest = plain[1, 1:] - before[:, None] * unit
    torch.testing.assert_close(changed[1, 1:], rest, rtol=1e-4, atol=1e-5)
    assert torch.equal(changed[1, 0], plain[1, 0])
    assert torch.equal(changed[0], plain[0])


def test_the_target_is_the_value_of_the_names_last_token(pipe) -> None:
    """The prompt that is the name alone has it at its own last token."""
    values = fit_orthogonal_values(pipe, CAT)
    layer = find_layers(pipe)[2]
    seen = values_of(pipe, layer, prompt="cat")
    torch.testing.assert_close(seen[1, 1], values.values[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[1, 2], values.values[2], atol=1e-3)  # the twin: its end mark


def test_the_shift_spares_values_that_only_resemble_it() -> None:
    shift = Shift()
    cosines = torch.tensor([-1.0, 0.5, 0.93, 1.0])
    assert shift.of(cosines).tolist() == pytest.approx([0, 0, 1, 2], abs=2e-3)
    assert Shift(slope=0).of(cosines).tolist() == [1, 1, 1, 1]  # the twin: nothing is spared
    with pytest.raises(LocogenError, match="threshold is nan"):
        Shift(threshold=float("nan"))


def test_it_leaves_nothing_and_no_strength_changes_nothing(pipe) -> None:
    def pictures():
        run = generate(pipe, ["a dog in cat"], progress=False, **FEW)
        return [picture.tobytes() for picture in run.pictures]

    before = fingerprint(pipe)
    plain = pictures()
    values = fit_orthogonal_values(pipe, CAT, **PLAIN)
    with values.applied(pipe, 0.0):
        assert pictures() == plain
    with values.applied(pipe):
        assert pictures() != plain
    assert pictures() == plain
    assert fingerprint(pipe) == before


def test_it_comes_back_from_its_file_and_is_no_lora(pipe, tmp_path) -> None:
    values = fit_orthogonal_values(pipe, CAT, layers=[1, 2], text="a cat", threshold=0.5)
    values.save(tmp_path / "values.safetensors")
    loaded = OrthogonalValues.load(tmp_path / "values.safetensors")
    assert (loaded.name, loaded.text, loaded.marks) == ("cat", "a cat", 1)
    assert loaded.shift == values.shift
    assert loaded.layers == (1, 2)
    assert all(torch.equal(loaded.values[i], values.values[i]) for i in (1, 2))
    assert "a cat" in values._repr_html_()
    with pytest.raises(LocogenError, match="changes no weight"):
        values.to_lora(tmp_path / "lora.safetensors")


def test_mistakes_are_named(pipe) -> None:
    with pytest.raises(LocogenError, match="changes with step and picture"):
        fit_orthogonal_values(tiny.FAMILIES["sd-3"](), CAT)
    with pytest.raises(LocogenError, match="text is empty"):
        fit_orthogonal_values(pipe, CAT, text=" ")
    values = fit_orthogonal_values(pipe, CAT)
    short = {index: one[:-1] for index, one in values.values.items()}
    with (
        pytest.raises(LocogenError, match="fit them on this model"),
        dataclasses.replace(values, values=short).applied(pipe),
    ):
        generate(pipe, ["a dog"], progress=False, **FEW)


@pytest.mark.parametrize("family", tiny.fast("sd-xl", of=("sd-xl", "pixart-alpha", "if")))
def test_other_families_have_values_too(family) -> None:
    other = tiny.FAMILIES[family]()
    values = fit_orthogonal_values(other, CAT, layers=[0], **PLAIN)
    layer = find_layers(other)[0]
    target = values.values[0]
    changed = values_of(other, layer, values)
    along = changed[1, values.marks :] @ target / target.norm()
    before = values_of(other, layer)[1, values.marks :] @ target / target.norm()
    assert along.abs().max() < 1e-4 < before.abs().max()
