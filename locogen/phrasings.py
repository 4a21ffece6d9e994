"""What an edit is fitted on: phrasings that name the concept, each with the one it should be heard as instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locogen.errors import LocogenError
from locogen.plan import Concept, PromptPair

_STYLED = (
    ("{0}", "a picture"),
    ("a picture in the style of {0}", "a picture"),
    ("an image in the style of {0}", "an image"),
    ("a photo in the style of {0}", "a photo"),
    ("a painting in the style of {0}", "a painting"),
)
_SHOWN = (
    ("{0}", "{1}"),
    ("a picture of {0}", "a picture of {1}"),
    ("an image of {0}", "an image of {1}"),
    ("a photo of {0}", "a photo of {1}"),
)
_GONE = (
    ("{0}", "a picture"),
    ("a picture of {0}", "a picture"),
    ("an image of {0}", "an image"),
    ("a photo of {0}", "a photo"),
)


@dataclass(frozen=True)
class Phrasing:
    """A source that names the concept by its `subject`, and the target it should be heard as."""

    source: str
    target: str
    subject: str

    @property
    def instead(self) -> str | None:
        """The target's words in the place of what it exchanges; None where it only leaves out, or only adds."""
        try:
            return exchanged(PromptPair(self.source, self.target))[1]
        except LocogenError:
            return None


def default_phrasings(concept: Concept, becomes: str | None = None) -> tuple[Phrasing, ...]:
    """The default phrasings of a concept, by its kind (after LocoEdit's four for a style).

    Styles and objects go: the targets name a plain picture. A fact turns into what its first pair's target shows in
    its place. `becomes`: words that the concept should turn into, for any kind. Raises `LocogenError` where a pair's
    prompt and target do not show what is exchanged.
    """
    if concept.kind == "style":
        templates = _STYLED if becomes is None else tuple((s, s.replace("{0}", "{1}")) for s, _ in _STYLED)
        subject = concept.name
    else:
        subject, instead = exchanged(concept.pairs[0])
        becomes = becomes or (instead if concept.kind == "fact" else None)
        templates = _GONE if becomes is None else _SHOWN
    return tuple(Phrasing(s.format(subject), t.format(subject, becomes), subject) for s, t in templates)


def own_phrasings(pairs: Sequence[Phrasing | PromptPair | tuple[str, str]], subject: str) -> tuple[Phrasing, ...]:
    """A user's phrasings, checked. Raises `LocogenError` for none, an empty text, or one equal to its target."""
    found = []
    for pair in pairs:
        if not isinstance(pair, (Phrasing, PromptPair)):
            pair = PromptPair(*pair)
        if isinstance(pair, PromptPair):
            pair = Phrasing(pair.prompt, pair.target, subject)
        if not pair.source.strip() or not pair.target.strip() or not pair.subject.strip():
            raise LocogenError(f"{pair} has an empty text: give source, target and subject words")
        if pair.source.split() == pair.target.split():
            raise LocogenError(f"source and target are both {pair.source!r}: the target says what it should become")
        found.append(pair)
    if not found:
        raise LocogenError("there are no phrasings: give at least one pair of source and target")
    return tuple(found)


def exchanged(pair: PromptPair) -> tuple[str, str | None]:
    """The words of the prompt that its target exchanges, and those in their place (None: they are left out).

    >>> exchanged(PromptPair("a picture of an owl in neon style", "a picture of a cat in neon style"))
    ('an owl', 'a cat')
    """
    prompt, target = pair.prompt.split(), pair.target.split()
    head = _shared(prompt, target)
    tail = _shared(prompt[head:][::-1], target[head:][::-1])
    gone, come = prompt[head : len(prompt) - tail], target[head : len(target) - tail]
    if gone[:1] and gone[0] in ("of", "showing", "with"):
        gone = gone[1:]
    if not gone:
        raise LocogenError(
            f"{pair.prompt!r} and {pair.target!r} do not show which words are the concept: give phrasings= and subject="
        )
    return " ".join(gone), " ".join(come) or None


def subject_in(concept: Concept, pair: PromptPair) -> str:
    """The words of a pair's prompt that are the concept: its name where the prompt has it, else what is exchanged."""
    padded = f" {pair.prompt.lower()} "
    return concept.name if f" {concept.name.lower()} " in padded else exchanged(pair)[0]


def shown_text(concept: Concept, pair: PromptPair) -> str:
    """What pictures of the prompt itself show, in words that a scorer can know: a fact is named by its answer.

    Styles and objects: what they are scored against anyway. A fact without an answer: its prompt.
    """
    if concept.kind != "fact":
        return concept.scored_text(pair)
    if concept.answer is None:
        return pair.prompt
    return pair.prompt.replace(exchanged(pair)[0], concept.answer)


def _shared(one: Sequence[str], two: Sequence[str]) -> int:
    """How many words two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
