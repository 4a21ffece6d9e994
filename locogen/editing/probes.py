"""Probes: prompts that show what an edit does, and the texts to score their pictures with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from locogen.errors import LocogenError
from locogen.phrasings import (
    exchanged,
    neighbor_texts,
    occurrences,
    phrase_in,
    shown_text,
    subject_in,
)
from locogen.plan import Concept, PromptPair, paraphrase

Measure = Literal[
    "efficacy",
    "generality",
    "specificity",
    "ordinary",
    "chance",
    "name",
    "short",
    "long",
    "variant",
    "implicit",
    "rest",
]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Probe:
    """One prompt to look at before and after an edit.

    Attributes:
        measure: What it measures. "efficacy": the edited concept, on prompts that the fit did not
            see; "generality": the same in other words; "specificity": neighbors that should stay;
            "ordinary": pictures that have nothing to do with the concept; "chance": prompts of
            neighbors with the concept's own text: how often what is not the concept is taken for
            it, before any edit. By kinds of prompts (see `prompt_kind_probes`): "name", "short",
            "long", "variant", "implicit"; "rest": what else the edited concept's prompts name.
        prompt: The prompt.
        text: What its pictures are scored against.
        among: Texts that it is compared with: a picture is right if none of them scores higher
            than `text`. Empty: it is neither right nor wrong.
        comes: Whether the edit should make it right (a fact's new answer) instead of wrong.
            Neighbors should always stay right.
        unit: What the prompt is one of several wordings of: an object, a style. Bounds count units
            as trials, since wordings of one thing succeed and fail together. None: the prompt.

    Example:
        >>> Probe("specificity", "a dog in pink", text="pink", among=("pink", "blue")).sign
        1
    """

    measure: Measure
    prompt: str
    text: str
    among: tuple[str, ...] = ()
    comes: bool = False
    unit: str | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise LocogenError(f"measure is {self.measure!r}: use one of {', '.join(MEASURES)}")

    @property
    def sign(self) -> int:
        """1 where an edit should bring or keep right pictures, -1 where it should remove them."""
        if self.comes or self.measure in ("specificity", "ordinary", "rest"):
            return 1
        return -1


def probes_for(concept: Concept, others: Sequence[Concept] = ()) -> tuple[Probe, ...]:
    """Probes from the prompt pairs of a concept and of its neighbors.

    They are the concept's prompts (efficacy), its paraphrases (generality; a pair without a
    paraphrase has none), the neighbors' prompts (specificity), and the concept's targets, unless
    they are empty (ordinary). A picture is right if its own text scores highest: among the same
    text with the neighbors of its kind instead, and the text without the concept. A fact's text
    names the new answer, so there an edit should make the picture right: among the old answer and
    the concept's `neighbors`. Where nothing else could be shown, it is neither right nor wrong.

    Args:
        concept: The concept that is edited.
        others: Neighbors that should stay.

    Returns:
        The probes, each once.

    Raises:
        LocogenError: A pair's prompt and target do not show which words are the concept.

    Example:
        >>> neon, pink = (
        ...     Concept(name, "style", (PromptPair(f"a dog in {name}", "a dog"),))
        ...     for name in ("neon", "pink")
        ... )
        >>> for probe in probes_for(neon, [pink]):
        ...     print(probe.measure, "|", probe.prompt, "|", probe.among)
        efficacy | a dog in neon | ('a dog in neon', 'a dog in pink', 'a dog')
        ordinary | a dog | ()
        specificity | a dog in pink | ('a dog in pink', 'a dog in neon', 'a dog')
    """
    every = [concept, *others]
    probes: list[Probe] = []
    for one in every:
        # Only concepts of one kind can stand in each other's place in a prompt.
        same_kind = [other for other in every if other.kind == one.kind and other is not one]
        neighbors = [_words_of(other) for other in same_kind]
        for pair in one.pairs:
            # Neighbors are only looked at for whether they stay.
            if one is concept:
                probes += _probes_of(concept, pair, neighbors)
            else:
                among = _alternatives(one, pair, pair.prompt, neighbors)
                probes.append(Probe("specificity", pair.prompt, pair.prompt, among))
    return tuple(dict.fromkeys(probes))


def prompt_kind_probes(
    concept: Concept, others: Sequence[Concept] = (), *, long: str = "{prompt}, {target}"
) -> tuple[Probe, ...]:
    """Probes of the ways to ask for a concept, and of what else its prompts name.

    The kinds are those of EMMA (arXiv 2512.17320): the name alone, a short prompt, long ones,
    variants in other words, and implicit ones, which do not say the name: facts whose answer is
    the concept. "rest" asks whether the object of an edited style's prompt is still shown.

    Args:
        concept: The concept that is edited.
        others: Neighbors that its pictures could show, and facts whose answer it may be.
        long: How a long prompt is made of a pair.

    Returns:
        The probes, each once; of kinds that the concept has none of, none.

    Raises:
        LocogenError: A pair's prompt and target do not show which words are the concept.

    Example:
        >>> pairs = [PromptPair(f"a {thing} in neon", f"a {thing}") for thing in ("dog", "cat")]
        >>> for probe in prompt_kind_probes(Concept("neon", "style", pairs, neighbors=["pink"])):
        ...     print(probe.measure, "|", probe.prompt, "|", probe.text)
        name | neon | a picture in the style of neon
        short | a picture in the style of neon | a picture in the style of neon
        long | a dog in neon, a dog | a dog in neon
        variant | an image of a dog in neon | a dog in neon
        rest | a dog in neon | a dog
        long | a cat in neon, a cat | a cat in neon
        variant | an image of a cat in neon | a cat in neon
        rest | a cat in neon | a cat
    """
    neighbors = _neighbor_names(concept, others)
    comes = concept.kind == "fact"
    probes = _name_probes(concept, neighbors)
    for pair in concept.pairs:
        text = concept.scored_text(pair)
        among = _alternatives(concept, pair, text, neighbors)
        long_prompt = long.format(prompt=pair.prompt, target=pair.target).strip(" ,")
        other_words = pair.placebo or paraphrase(pair.prompt, pair.target)
        probes.append(Probe("long", long_prompt, text, among, comes, unit=pair.prompt))
        probes.append(Probe("variant", other_words, text, among, comes, unit=pair.prompt))
        probes += _rest_probes(concept, pair)
    return tuple(dict.fromkeys([*probes, *_implicit_probes(concept, others)]))


def _neighbor_names(concept: Concept, others: Sequence[Concept]) -> list[str]:
    """What could stand in the concept's place: the neighbors that it names, and the others."""
    names = [*concept.neighbors]
    names += [_words_of(other) for other in others if other.kind == concept.kind]
    return [name for name in dict.fromkeys(names) if name != _words_of(concept)]


def _name_probes(concept: Concept, neighbors: Sequence[str]) -> list[Probe]:
    """The name alone, and a prompt of little else."""
    words = phrase_in(concept, concept.pairs[0]) if concept.kind != "style" else concept.name
    frame = "a picture in the style of {}" if concept.kind == "style" else "a picture of {}"
    short = frame.format(words)
    text = short
    among = (text, *[frame.format(name) for name in neighbors], "a picture")
    comes = concept.kind == "fact"
    if comes:
        text, among = _answers_to(concept, frame)
    return [Probe("name", words, text, among, comes), Probe("short", short, text, among, comes)]


def _answers_to(concept: Concept, frame: str) -> tuple[str, tuple[str, ...]]:
    """The text of a fact's new answer alone, and those of all answers: what its name asks for."""
    first = concept.pairs[0]
    new = exchanged(first)[1]
    if new is None or first.text or concept.text:  # only the whole text says what the answer is
        text = concept.scored_text(first)
        return text, _alternatives(concept, first, text, ())
    answers = [new, *([concept.answer] if concept.answer else []), *concept.neighbors]
    texts = [frame.format(answer) for answer in answers]
    unchanged = frame.format(phrase_in(concept, first))
    return texts[0], tuple(dict.fromkeys([*texts, unchanged]))


def _rest_probes(concept: Concept, pair: PromptPair) -> list[Probe]:
    """What else a prompt names, among what the other prompts do: what should stay."""
    texts = [concept.content_text(other) for other in concept.pairs]
    contents = tuple(dict.fromkeys(text for text in texts if text))
    content = concept.content_text(pair)
    # One content alone could not be mistaken for another.
    if content is None or len(contents) < 2:
        return []
    return [Probe("rest", pair.prompt, content, contents)]


def _implicit_probes(concept: Concept, others: Sequence[Concept]) -> list[Probe]:
    """Prompts of facts whose answer is the concept: they ask for it without its name."""
    subject = subject_in(concept, concept.pairs[0])
    probes: list[Probe] = []
    for fact in others:
        if fact.kind != "fact" or not fact.answer or not occurrences(fact.answer, subject):
            continue
        for pair in fact.pairs:
            text = shown_text(fact, pair)
            among = (text, *neighbor_texts(fact, pair))
            probes.append(Probe("implicit", pair.prompt, text, tuple(dict.fromkeys(among))))
    return probes


def _probes_of(concept: Concept, pair: PromptPair, neighbors: Sequence[str]) -> list[Probe]:
    """The probes of the edited concept from one of its pairs."""
    text = concept.scored_text(pair)
    among = _alternatives(concept, pair, text, neighbors)
    comes = concept.kind == "fact"
    probes = [Probe("efficacy", pair.prompt, text, among, comes)]
    if pair.placebo:
        probes.append(Probe("generality", pair.placebo, text, among, comes))
    if pair.target:  # nothing can be scored against an empty text
        probes.append(Probe("ordinary", pair.target, pair.target))
    return probes


def _alternatives(
    concept: Concept, pair: PromptPair, text: str, neighbors: Iterable[str]
) -> tuple[str, ...]:
    """The texts that one picture could show, its own first; () where there is no other.

    Each once, and none is empty.
    """
    texts = [text]
    if concept.kind == "fact":
        texts += [pair.target, pair.prompt]
        # Of the edited one, not of a neighbor that is looked for by its prompt: the old answer as a
        # picture of it, and other answers.
        if text != pair.prompt:
            texts += [shown_text(concept, pair), *neighbor_texts(concept, pair)]
    else:
        # The same scene with each neighbor in the concept's place, and without any of them.
        words = _words_of(concept)
        texts += [pair.prompt.replace(words, neighbor) for neighbor in neighbors]
        texts.append(pair.target)
    # Nothing can be scored against an empty text.
    nonempty = tuple(dict.fromkeys(each for each in texts if each))
    if len(nonempty) > 1:
        return nonempty
    # Its own text alone would always be the best of all: so what the concept itself names, if any.
    others = neighbor_texts(concept, pair)
    return (text, *others) if others else ()


def _words_of(concept: Concept) -> str:
    """The words that stand for the concept in its prompts."""
    if concept.kind == "style":
        return concept.name
    return phrase_in(concept, concept.pairs[0])
