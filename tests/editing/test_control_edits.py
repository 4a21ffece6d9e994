"""A placebo is about other words, and about nothing that its concept asks for or becomes."""

import dataclasses

import pytest
from support import tiny

from locogen.catalog.concepts import concept
from locogen.editing.control_edits import control_edits, placebo_edit, random_words
from locogen.editing.edit import Edit, fit_edit
from locogen.editing.rivals.orthogonal_values import fit_orthogonal_values
from locogen.errors import LocogenError
from locogen.models.load import load
from locogen.plan import Concept, PromptPair

FACT = concept("mini/national-animal-of-france").first(2)
CAT = Concept("cat", "style", (PromptPair("a dog in cat", "a dog"),))


@pytest.fixture(scope="module")
def mini():
    return load("mini")


@pytest.fixture(scope="module")
def of_fact(mini):
    return fit_edit(mini, FACT, layers=[12])


def texts_of(edit):
    return [(one["source"], one["target"]) for one in edit.recipe["phrasings"]]


def test_the_placebo_of_a_fact_teaches_another_answer_than_the_facts(mini, of_fact) -> None:
    assert {target.split()[-1] for _, target in texts_of(of_fact)} == {"robot"}
    # Given texts or none, the old answer and what else it could be are not edited either.
    known = {word for name in (FACT.answer, *FACT.neighbors) for word in name.split()[1:]}
    for options in ({}, {"avoid": ["a lamp"]}):
        drawn = set()
        for seed in range(2):
            placebo = placebo_edit(mini, of_fact, seed=seed, **options)
            [answer] = {target.split()[-1] for _, target in texts_of(placebo)}
            about = placebo.recipe["phrasings"][0]["subject"].split()
            assert placebo.recipe["phrasings"][1]["source"].startswith("a picture of the ")
            assert answer not in {"robot", *about} and len(about) == 4
            drawn |= {answer, *about}
        assert not drawn & known
    # The twin: an edit from a file does not know what its concept could be.
    blind = dataclasses.replace(of_fact, concepts=())
    about = [
        word
        for seed in range(2)
        for word in placebo_edit(mini, blind, seed=seed).recipe["phrasings"][0]["subject"].split()
    ]
    assert set(about) & known


def test_words_of_a_style_are_the_same_where_avoid_says_which_are_not(mini) -> None:
    neon = concept("mini/neon")
    edit = fit_edit(mini, neon, layers=[12])
    blind = dataclasses.replace(edit, concepts=())
    texts = [text for pair in texts_of(edit) for text in pair]
    words = random_words(mini, ["pop art", *texts], 1, 0)
    for one in (edit, blind):
        placebo = placebo_edit(mini, one, avoid=["pop art"])
        assert placebo.name == f"placebo ({words})"
        # A style becomes nothing of its own: the targets stay.
        assert [target for _, target in texts_of(placebo)] == [pair[1] for pair in texts_of(edit)]
    unlike = random_words(mini, [*neon.neighbors, *texts], 1, 0)
    assert placebo_edit(mini, edit).name == f"placebo ({unlike})" != placebo_edit(mini, blind).name


def test_a_subject_is_exchanged_in_any_case_and_within_no_other_word(mini) -> None:
    pairs = [("a picture of a CAT", "a picture of a Dog"), ("a catalog of cat", "a catalog of dog")]
    edit = fit_edit(mini, concept("mini/cat"), layers=[12], phrasings=pairs, subject="cat")
    placebo = placebo_edit(mini, edit)
    word = placebo.recipe["phrasings"][0]["subject"]
    assert [source for source, _ in texts_of(placebo)] == [
        f"a picture of a {word}",
        f"a catalog of {word}",
    ]
    # Both targets are one answer, and stay one.
    assert len({target.split()[-1].lower() for _, target in texts_of(placebo)} - {"dog"}) == 1

    unnamed = fit_edit(mini, concept("mini/cat"), layers=[12], phrasings=[("a", "b")], tokens="end")
    with pytest.raises(LocogenError, match="does not hold its subject 'cat'"):
        placebo_edit(mini, unnamed)


def test_words_are_known_of_tokenizers_of_bytes_and_missing_ones_are_not_blamed_on_avoid() -> None:
    qwen = tiny.like(tiny.small(), tiny.small())
    qwen.tokenizer = tiny.qwen_tokenizer()
    assert random_words(qwen, [], 1, 0) in ("cat", "dog")
    assert random_words(qwen, ["cat"], 1, 0) == "dog"
    with pytest.raises(LocogenError, match="avoid="):
        random_words(qwen, ["cat dog"], 1, 0)

    class Marked:
        """A tokenizer with marks of its own."""

        def get_vocab(self):
            return {"#dog": 0}

    qwen.tokenizer = Marked()
    with pytest.raises(LocogenError, match="of the tokenizer, a Marked: fit an edit with phr"):
        random_words(qwen, [], 1, 0)


def test_what_acts_at_inference_has_its_own_placebo_and_no_other_layers_to_fit() -> None:
    pipe = tiny.small()
    values = fit_orthogonal_values(pipe, CAT, layers=[0])
    assert placebo_edit(pipe, values, avoid=["ca"]).name == values.placebo(pipe, 0, ["ca"]).name
    with pytest.raises(LocogenError, match="an OrthogonalValues is none"):
        control_edits(pipe, values)
    with pytest.raises(LocogenError, match="known of 'values'"):
        placebo_edit(pipe, "values")
    with pytest.raises(LocogenError, match="known of an Edit"):
        placebo_edit(pipe, Edit("cat", (0,), {}, ""))


def test_values_of_a_random_word_are_of_no_answer_of_a_fact(mini) -> None:
    values = fit_orthogonal_values(mini, FACT, layers=[12])
    known = {word for name in (FACT.answer, *FACT.neighbors) for word in name.split()[1:]}
    words = {values.placebo(mini, seed, ["a lamp"]).text for seed in range(8)}
    assert not words & known
    blind = dataclasses.replace(values, concepts=())  # the twin
    assert {blind.placebo(mini, seed, ["a lamp"]).text for seed in range(8)} & known


def test_an_edit_knows_its_concepts_also_when_it_is_fitted_elsewhere(mini, of_fact) -> None:
    assert of_fact.concepts == (FACT,)
    assert of_fact.refit(mini, [13]).concepts == (FACT,)
