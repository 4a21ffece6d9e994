"""Hardening: what a training found is edited as well; theorems on a tiny model, each with its twin."""

import dataclasses

import pytest
import torch
from support import tiny

from locogen.attacks.harden import _against, harden
from locogen.attacks.loss import DenoisingLoss
from locogen.editing.edit import Edit, fit_edit
from locogen.errors import LocogenError
from locogen.interventions.words import speaking
from locogen.models.families import encode
from locogen.pictures.fingerprint import fingerprint
from locogen.plan import Concept, PromptPair

CAT = Concept(
    "cat",
    "style",
    (PromptPair("a dog in cat", "a dog"), PromptPair("a do in cat", "a do")),
    neighbors=("ca",),
)
PAIRS = [("a cat", "a do"), ("a dog in cat", "a dog")]
QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
QUICK |= {"steps": 2, "batch": 2, "rate": 0.5}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def edit(pipe):
    return fit_edit(pipe, CAT, layers=[0, 1], phrasings=PAIRS, tokens="all", ridge=0.1)


@pytest.fixture(scope="module")
def harder(pipe, edit):
    return harden(pipe, CAT, edit, rounds=2, **QUICK)


def missed(pipe, named_by, word, edit) -> float:
    """How far the edited matrices are from the targets, on a word's prompts."""
    vectors = torch.tensor(named_by.recipe["words"][word])
    total = 0.0
    with speaking(pipe, word, vectors):
        sources = [encode(pipe, [s.replace("cat", word)]).states[0].double() for s, _ in PAIRS]
    targets = [encode(pipe, [target]).states[0].double() for _, target in PAIRS]
    for name, change in edit.changes.items():
        old = pipe.unet.get_parameter(name).detach().double()
        for source, target in zip(sources, targets, strict=True):
            total += float((source @ (old + change.change).T - target @ old.T).square().sum())
    return total


def test_no_rounds_are_the_edit_itself(pipe, edit) -> None:
    assert harden(pipe, CAT, edit, rounds=0, **QUICK) is edit


def test_the_found_vectors_go_to_the_targets_after_their_round(pipe, edit, harder) -> None:
    first = harden(pipe, CAT, edit, **QUICK)
    assert list(harder.recipe["words"]) == ["<cat-1>", "<cat-2>"]
    # Rounds build on one another: the first of two is the one alone.
    assert harder.recipe["words"]["<cat-1>"] == first.recipe["words"]["<cat-1>"]
    assert missed(pipe, first, "<cat-1>", first) < 0.99 * missed(pipe, first, "<cat-1>", edit)
    assert missed(pipe, harder, "<cat-2>", harder) < 0.99 * missed(pipe, harder, "<cat-2>", first)


def test_it_leaves_nothing_on_the_model(pipe, edit, harder) -> None:
    before = fingerprint(pipe), id(pipe.tokenizer), len(pipe.tokenizer)
    harden(pipe, CAT, edit, **QUICK)
    assert (fingerprint(pipe), id(pipe.tokenizer), len(pipe.tokenizer)) == before
    with harder.applied(pipe):
        assert fingerprint(pipe) != before[0]  # the twin
    assert fingerprint(pipe) == before[0]


def test_a_hardened_edit_comes_back_from_its_file_and_from_its_recipe(
    pipe, harder, tmp_path
) -> None:
    harder.save(tmp_path / "cat.safetensors")
    loaded = Edit.load(tmp_path / "cat.safetensors")
    again = loaded.refit(pipe)
    for name, change in harder.changes.items():
        assert torch.equal(loaded.changes[name].change, change.change)
        assert torch.equal(again.changes[name].change, change.change)
    assert again.recipe["words"] == harder.recipe["words"]
    # Without its vectors the recipe would mean other words: the twin.
    bare = {name: value for name, value in harder.recipe.items() if name != "words"}
    with pytest.warns(UserWarning, match="does not know"):
        other = dataclasses.replace(harder, recipe=bare).refit(pipe)
    name = next(iter(harder.changes))
    assert not torch.allclose(other.changes[name].change, harder.changes[name].change)


def test_several_vectors_are_one_word(pipe, edit) -> None:
    two = harden(pipe, CAT, edit, vectors=2, **QUICK)
    assert len(two.recipe["words"]["<cat-1>"]) == 2
    assert missed(pipe, two, "<cat-1>", two) < 0.99 * missed(pipe, two, "<cat-1>", edit)


def test_a_finished_round_trains_no_more(pipe, edit, tmp_path, monkeypatch) -> None:
    first = harden(pipe, CAT, edit, folder=tmp_path, **QUICK)

    def trained(*args, **kwargs):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(DenoisingLoss, "per_row", trained)
    again = harden(pipe, CAT, edit, folder=tmp_path, **QUICK)
    assert again.recipe["words"] == first.recipe["words"]
    with pytest.raises(AssertionError, match="again"):  # another seed is another training
        harden(pipe, CAT, edit, folder=tmp_path, seed=1, **QUICK)


def test_words_do_not_disturb_one_another(pipe) -> None:
    """Each gives the states that it gives alone, and the other does not."""
    torch.manual_seed(0)
    vectors = torch.randn(2, 2, 16)
    prompts = ["a dog in <one>", "a dog in <two>", "a dog"]
    with speaking(pipe, "<one>", vectors[0]):
        one = encode(pipe, prompts[:1]).states
    with speaking(pipe, "<two>", vectors[1]):
        two = encode(pipe, prompts[1:2]).states
    plain = encode(pipe, prompts[2:]).states
    with speaking(pipe, "<one>", vectors[0]), speaking(pipe, "<two>", vectors[1]):
        both = encode(pipe, prompts).states
    assert torch.allclose(both, torch.cat([one, two, plain]), atol=1e-6)
    assert not torch.allclose(one, two, atol=1e-2)


def test_mistakes_are_named(pipe, edit) -> None:
    with pytest.raises(LocogenError, match="rounds is -1"):
        harden(pipe, CAT, edit, rounds=-1)
    with pytest.raises(LocogenError, match="steps is -1"):
        harden(pipe, CAT, edit, steps=-1)
    with pytest.raises(LocogenError, match="Stable Diffusion 1 and 2"):
        harden(tiny.FAMILIES["sd-xl"](), CAT, edit)
    phrasings = [{"source": "a dog", "target": "a do", "subject": "cat"}]
    other = dataclasses.replace(edit, recipe={**edit.recipe, "phrasings": phrasings})
    with pytest.raises(LocogenError, match="does not have its subject"):
        harden(pipe, CAT, other, **QUICK)


def test_vectors_stand_for_the_words_of_their_own_concept(pipe) -> None:
    dog = Concept("dog", "object", (PromptPair("a dog in a", "a do in a"),))
    both = fit_edit(pipe, [CAT, dog], layers=[0])
    hardened = _against(both, CAT, torch.zeros(1, 16))
    added = hardened.recipe["phrasings"][len(both.recipe["phrasings"]) :]
    of_cat = [one for one in both.recipe["phrasings"] if one["subject"] == "cat"]
    assert len(added) == len(of_cat) < len(both.recipe["phrasings"])
    with pytest.raises(LocogenError, match="no phrasing about 'ca'"):
        _against(both, dataclasses.replace(CAT, name="ca"), torch.zeros(1, 16))


def test_trained_words_are_refused_where_other_encoders_read_too(harder) -> None:
    with pytest.raises(LocogenError, match="vectors of their own"):
        harder.refit(tiny.FAMILIES["sd-xl"](), layers=[0])
