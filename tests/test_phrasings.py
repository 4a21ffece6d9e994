"""Where a text holds some words, what a pair exchanges, and which words of a prompt are its concept."""

import pytest

from locogen.errors import LocogenError
from locogen.phrasings import (
    Phrasing,
    default_phrasings,
    exchanged,
    neighbor_texts,
    occurrences,
    own_phrasings,
    phrase_in,
    put_in_place,
    shown_text,
    subject_in,
)
from locogen.plan import Concept, PromptPair

HILL = PromptPair("a picture of a cat on a hill", "a picture of a hill")


def concept(name: str, pair: PromptPair, kind="object") -> Concept:
    return Concept(name, kind, (pair,), text="any")


@pytest.mark.parametrize(
    ("text", "words", "held"),
    [
        ("a cat, on a hill", "cat", ["cat"]),
        ('a "cat".', "cat", ["cat"]),
        ("Cat and CAT", "cat", ["Cat", "CAT"]),
        ("a cat's cat-like cat", "cat", ["cat", "cat", "cat"]),
        ("cats, catalog, concat, cat_2", "cat", []),
        ("by van  gogh's\nbrother van gogh", "van gogh", ["van  gogh", "van gogh"]),
        ("van goghs", "van gogh", []),
        ("a <neon> in neon", "<neon>", ["<neon>"]),
        ("wall-e, wall e", "wall-e", ["wall-e"]),
        ("cafe\u0301 caf\u00e9", "caf\u00e9", ["cafe\u0301", "caf\u00e9"]),
        ("小猫在山上", "猫", ["猫"]),  # written without spaces
        ("a cat", " ", []),
        ("", "cat", []),
    ],
)
def test_words_are_found_as_words_of_their_own(text, words, held):
    assert [text[start:end] for start, end in occurrences(text, words)] == held


@pytest.mark.parametrize(
    ("prompt", "target", "words"),
    [
        ("a picture of a cat, on a hill", "a picture of a dog, on a hill", ("cat", "dog")),
        ("a picture of an owl in neon.", "a picture in neon.", ("an owl", None)),
        ('a "cat" on a hill', 'a "dog" on a hill', ("cat", "dog")),
        ("a house (in <neon>)", "a house", ("in <neon>", None)),
        ("a cat", "", ("a cat", None)),
    ],
)
def test_what_is_exchanged_has_no_punctuation_at_its_ends(prompt, target, words):
    assert exchanged(PromptPair(prompt, target)) == words


def test_a_comma_is_no_concept():
    with pytest.raises(LocogenError, match="do not show which words"):
        exchanged(PromptPair("a cat, on a hill", "a cat on a hill"))


@pytest.mark.parametrize(
    ("name", "prompt", "target", "subject"),
    [
        ("cat", "a picture of a cat, on a hill", "a picture on a hill", "cat"),
        ("cat", *(HILL.prompt, HILL.target), "cat"),
        ("van gogh", "an owl in the style of Van Gogh, on a hill", "an owl", "van gogh"),
        ("van gogh", "an owl in van gogh's style", "an owl", "van gogh"),
        ("vincent van gogh", "an owl in the style of gogh, on a hill", "an owl", "gogh"),
        ("cat", "two cats on a hill", "a hill", "cats"),
        ("cat", "a picture of a cat", "", "cat"),
        ("neon", "a house in <lights>, big", "a house, big", "in <lights>"),
    ],
)
def test_the_subject_is_the_name_first_and_else_what_is_exchanged(name, prompt, target, subject):
    pair = PromptPair(prompt, target)
    assert subject_in(concept(name, pair), pair) == subject


def test_a_subject_of_ones_own_is_in_the_prompt():
    pair = PromptPair("a picture of a cat, on a hill", "a picture on a hill")
    assert subject_in(concept("cat", pair), pair, "hill") == "hill"
    with pytest.raises(LocogenError, match="subject is 'zebra': the prompt 'a picture of a cat"):
        subject_in(concept("cat", pair), pair, "zebra")


def test_a_phrase_is_the_name_with_its_article():
    assert phrase_in(concept("cat", HILL), HILL) == "cat"
    owl = PromptPair("a picture of an owl, on a hill", "a picture")
    assert phrase_in(concept("owl", owl), owl) == "an owl"
    asked = PromptPair("a picture of the animal of france, on a hill", "a picture of a robot")
    assert phrase_in(concept("france", asked, "fact"), asked) == "the animal of france"
    fact = Concept("france", "fact", (asked,), answer="a rooster")
    assert shown_text(fact, asked) == "a picture of a rooster, on a hill"


@pytest.mark.parametrize(
    ("source", "target", "subject", "instead"),
    [
        ("a cat, on a hill", "a dog, in the sea", "cat", "dog"),
        ("a cat and a cat", "a dog and a dog", "cat", "dog"),
        ("a cat on a hill", "on a hill", "cat", None),
        ("a cat", "a cat in neon", "cat", None),
        ("an image of the animal of france", "an image of a robot", "france", "a robot"),
        ("a cat", "", "cat", None),
    ],
)
def test_what_stands_in_the_place_of_the_subject(source, target, subject, instead):
    assert put_in_place(source, target, subject) == instead
    assert Phrasing(source, target, subject).instead == instead


def test_phrasings_towards_nothing():
    """As UCE and ESD erase: every target is empty, asked for or because the concept's own are."""
    empty = concept("cat", PromptPair("a picture of a cat", ""))
    full = concept("cat", HILL)
    for phrasings in (default_phrasings(empty), default_phrasings(full, becomes="")):
        assert {(p.target, p.subject) for p in phrasings} == {("", "cat")}
        assert len({p.source for p in phrasings}) == len(phrasings) > 1
    assert {p.target for p in default_phrasings(full)} == {"a picture", "an image", "a photo"}
    assert own_phrasings([("a cat", "")], "cat") == (Phrasing("a cat", "", "cat"),)
    with pytest.raises(LocogenError, match="empty text"):
        own_phrasings([Phrasing("", "a cat", "cat")], "cat")


def test_neighbors_stand_in_the_place_of_the_name() -> None:
    style = PromptPair("an owl in the style of neon", "an owl")
    neon = Concept("neon", "style", (style,), neighbors=("neon", "pop art"))
    assert neighbor_texts(neon, style) == ("an owl in the style of pop art", "an owl")
    pair = PromptPair("a picture of an owl in neon", "a picture in neon")
    owl = Concept("owl", "object", (pair,), neighbors=("a dog", "an owl", "fox"))
    assert neighbor_texts(owl, pair) == (
        "a picture of a dog in neon",
        "a picture of an fox in neon",
    )
    alone = Concept("owl", "object", (pair,))
    assert neighbor_texts(alone, pair) == (), "no names, no neighbors"


def test_the_old_answer_of_a_fact_is_its_first_neighbor() -> None:
    pair = PromptPair("a picture of the animal of france, big", "a picture of a robot, big")
    fact = Concept("animal of france", "fact", (pair,), answer="a rooster", neighbors=("a cat",))
    rooster, cat = "a picture of a rooster, big", "a picture of a cat, big"
    assert neighbor_texts(fact, pair) == (rooster, cat)
    beside = ("art of joe biden", "art of barack obama")
    own = PromptPair("art of the president in 2014", "art of joe biden", neighbors=beside)
    who = Concept("president", "fact", (own,), answer="barack obama")
    assert neighbor_texts(who, own) == ("art of barack obama",)


def test_a_text_without_a_place_for_neighbors_is_refused() -> None:
    pair = PromptPair("an owl in neon", "an owl", text="bright lines")
    with pytest.raises(LocogenError, match="whole texts"):
        neighbor_texts(Concept("neon", "style", (pair,), neighbors=("pop art",)), pair)
