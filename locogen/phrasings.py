"""What an edit is fitted on: phrasings that name the concept, each with the one to replace it.

Words are found in the text itself, by its letters; `models.families` says which tokens they become.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from locogen.errors import LocogenError
from locogen.plan import Concept, PromptPair

# Templates: a phrasing that names the concept {0}, and what it becomes: without {0}, or with {1}
# in its place. A style disappears:
_STYLED = (
    ("{0}", "a picture"),
    ("a picture in the style of {0}", "a picture"),
    ("an image in the style of {0}", "an image"),
    ("a photo in the style of {0}", "a photo"),
    ("a painting in the style of {0}", "a painting"),
)
# An object or a fact becomes something else, {1}:
_SHOWN = (
    ("{0}", "{1}"),
    ("a picture of {0}", "a picture of {1}"),
    ("an image of {0}", "an image of {1}"),
    ("a photo of {0}", "a photo of {1}"),
)
# An object disappears:
_GONE = (
    ("{0}", "a picture"),
    ("a picture of {0}", "a picture"),
    ("an image of {0}", "an image"),
    ("a photo of {0}", "a photo"),
)

# Marks are no part of a word. < > and * are not among them: tokens of textual inversion have them.
_MARKS = r".,;:!?…\"“”„‘’«»‹›()\[\]{}、。，！？；："
# A word, hyphens and apostrophes included; or one mark.
_WORD = re.compile(rf"[^\s{_MARKS}]+|[{_MARKS}]")
# What is taken off the ends of words that are looked for.
_EDGES = _MARKS.replace("\\", "") + "'`-–—"
_CONNECTIVES = ("of", "showing", "with")
_ARTICLES = ("a", "an", "the")
# Scripts that write words without spaces: there, a name is found inside a run of letters too.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)

Span = tuple[int, int]  # from which letter of a text, to before which


# --- words in a text -----------------------------------------------------------------------------


def occurrences(text: str, words: str) -> tuple[Span, ...]:
    """Where a text holds some words as whole words, whatever their case and the white space.

    A name inside another word does not count ("cat" in "catalog", "cats", "concat"); one before an
    apostrophe or a hyphen does ("van gogh's"). Scripts without spaces have no whole words.

    Args:
        text: A prompt.
        words: What is looked for, such as a concept's name.

    Returns:
        The first letter of each occurrence and the one behind its last, from left to right.

    >>> occurrences("A cat's catalog of cats, cat", "cat")
    ((2, 5), (25, 28))
    """
    parts = words.split()
    if not parts:
        return ()
    # A letter with an accent may be one character, or two: the text may have either.
    name = " ".join(parts)
    spellings = {name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)}
    patterns = []
    for spelling in sorted(spellings):
        patterns.append(r"\s+".join(re.escape(part) for part in spelling.split()))
    spans = []
    for match in re.finditer("|".join(patterns), text, re.IGNORECASE):
        if _stands_alone(text, *match.span()):
            spans.append(match.span())
    return tuple(spans)


def _stands_alone(text: str, start: int, end: int) -> bool:
    joined_before = _joined(text[start - 1 : start], text[start])
    joined_behind = _joined(text[end - 1], text[end : end + 1])
    return not (joined_before or joined_behind)


def _joined(left: str, right: str) -> bool:
    """Whether two neighboring letters belong to one word."""
    if not _is_letter(left) or not _is_letter(right):
        return False
    return not _UNSPACED.match(left) and not _UNSPACED.match(right)


def _is_letter(character: str) -> bool:
    if character.isalnum() or character == "_":
        return True
    # Accents that are characters by themselves belong to the word too.
    return unicodedata.category(character or " ").startswith("M")


def without_marks(words: str) -> str:
    """The words without punctuation at their ends; themselves where they are nothing else.

    >>> without_marks('"a cat",')
    'a cat'
    """
    return words.strip().strip(_EDGES + " ") or words.strip()


def shared_words(words: str, name: str) -> str | None:
    """The part of some words that is the name, or from the first to the last word they share.

    Articles and connectives do not count, plurals count as their singular. None where they share
    nothing.

    >>> shared_words("in the style of gogh", "vincent van gogh")
    'gogh'
    """
    whole = occurrences(words, name)
    if whole:
        start, end = whole[-1]
        return words[start:end]
    of_name = {_singular(word) for word in name.split()} - {*_ARTICLES, *_CONNECTIVES, "in"}
    spans = [match.span() for match in _WORD.finditer(words) if _singular(match.group()) in of_name]
    if not spans:
        return None
    return words[spans[0][0] : spans[-1][1]]


def _singular(word: str) -> str:
    plain = re.sub(r"['’]s?$", "", word.casefold())
    return plain.removesuffix("s")


# --- what a pair exchanges -----------------------------------------------------------------------


def put_for(text: str, spans: Sequence[Span], words: str) -> str:
    """The text with other words in the place of each of these spans, from `occurrences`.

    >>> put_for("A cat's catalog", occurrences("A cat's catalog", "cat"), "dog")
    "A dog's catalog"
    """
    # From the right, so that the spans before keep their places.
    for start, end in reversed(spans):
        text = text[:start] + words + text[end:]
    return text


def exchanged(pair: PromptPair) -> tuple[str, str | None]:
    """The words of the prompt that its target exchanges, and those in their place (None: none).

    Without punctuation at their ends. Raises `LocogenError` where no word is exchanged.

    >>> exchanged(PromptPair("picture of an owl, in neon style", "picture of a cat, in neon style"))
    ('an owl', 'a cat')
    """
    prompt = list(_WORD.finditer(pair.prompt))
    target = list(_WORD.finditer(pair.target))
    head = shared_length(_texts(prompt), _texts(target))
    tail = shared_length(_texts(prompt[head:])[::-1], _texts(target[head:])[::-1])
    gone = without_marks(_joint(pair.prompt, prompt[head : len(prompt) - tail]))
    come = without_marks(_joint(pair.target, target[head : len(target) - tail]))
    first, _, rest = gone.partition(" ")
    if first in _CONNECTIVES:
        gone = rest.strip()
    if not _has_letters(gone):
        raise LocogenError(
            f"{pair.prompt!r} and {pair.target!r} do not show which words are the concept: "
            "give phrasings= and subject="
        )
    return gone, come if _has_letters(come) else None


def _texts(words: Sequence[re.Match[str]]) -> list[str]:
    return [word.group() for word in words]


def _joint(text: str, words: Sequence[re.Match[str]]) -> str:
    """The text from the first to the last of some neighboring words, as it is written."""
    return text[words[0].start() : words[-1].end()] if words else ""


def _has_letters(words: str) -> bool:
    """Whether there is more than punctuation; the signs of textual inversion count as words."""
    return bool(words.strip(_EDGES + " "))


def shared_length(one: Sequence[object], two: Sequence[object]) -> int:
    """How many words, or tokens, two texts begin with in common."""
    length = 0
    for left, right in zip(one, two, strict=False):
        if left != right:
            break
        length += 1
    return length


def subject_in(concept: Concept, pair: PromptPair, words: str = "") -> str:
    """Find the words of a pair's prompt that are the concept.

    Args:
        concept: The concept; its name is looked for first.
        pair: One of its prompt pairs.
        words: Words that are meant in place of those found here, which the prompt must hold; "":
            none.

    Returns:
        These words; without them, the concept's name where the prompt has it; otherwise the words
        that the target exchanges, or the part of them that they share with the name.

    Raises:
        LocogenError: If the prompt lacks the words, or the name while no word is exchanged.

    Example:
        >>> pair = PromptPair("a house in the style of gogh", "a house")
        >>> subject_in(Concept("vincent van gogh", "style", (pair,)), pair)
        'gogh'
    """
    if words:
        if not occurrences(pair.prompt, words):
            raise LocogenError(
                f"subject is {words!r}: the prompt {pair.prompt!r} does not hold it as whole "
                "words, so give words that every prompt has, or leave it empty"
            )
        return words
    if occurrences(pair.prompt, concept.name):
        return concept.name
    gone = exchanged(pair)[0]
    return shared_words(gone, concept.name) or gone


def phrase_in(concept: Concept, pair: PromptPair) -> str:
    """The words that name the concept in a sentence: `subject_in` with its article.

    For a fact also the words before it, which ask for the answer.

    >>> owl = PromptPair("a picture of an owl on a hill", "a picture of a hill")
    >>> phrase_in(Concept("owl", "object", (owl,)), owl)
    'an owl'
    """
    gone = exchanged(pair)[0]
    subjects = occurrences(gone, subject_in(concept, pair))
    if not subjects:
        return gone
    start, end = subjects[0]
    if concept.kind == "fact" and pair.target:
        # The words before the name ask for the answer: "the animal of" france.
        return gone[:end]
    before = gone[:start].split()
    if before and before[-1].lower() in _ARTICLES:
        start = gone.rindex(before[-1], 0, start)
    return gone[start:end]


def put_in_place(source: str, target: str, subject: str) -> str | None:
    """The target's words in the place of the source's subject.

    None where there are none, or the subject stays.

    >>> put_in_place("a cat, on a hill", "a dog, in the sea", "cat")
    'dog'
    """
    subjects = occurrences(source, without_marks(subject))
    if not subjects:
        return None
    start, end = subjects[0]
    old = list(_WORD.finditer(source))
    new = list(_WORD.finditer(target))
    matcher = SequenceMatcher(None, _texts(old), _texts(new), autojunk=False)
    # A step takes the old words from `first` to the new words from `new_first`; those that touch
    # the subject say what comes in its place.
    is_changed = False
    in_place: list[range] = []
    for kind, first, last, new_first, new_last in matcher.get_opcodes():
        touches = any(word.start() < end and start < word.end() for word in old[first:last])
        if touches:
            in_place.append(range(new_first, new_last))
            is_changed = is_changed or kind != "equal"
    if not is_changed:
        return None
    come = without_marks(_joint(target, new[in_place[0].start : in_place[-1].stop]))
    return come if _has_letters(come) else None


def shown_text(concept: Concept, pair: PromptPair) -> str:
    """Say what pictures of a prompt itself show, in words that a scorer can know.

    Args:
        concept: The concept.
        pair: One of its prompt pairs.

    Returns:
        For styles and objects the text that they are scored against; for a fact the prompt with the
        answer in place of the words that ask for it, or the prompt where the answer is unknown.

    Example:
        >>> pair = PromptPair("a picture of the animal of france", "a picture of a cat")
        >>> shown_text(Concept("animal of france", "fact", (pair,), answer="a rooster"), pair)
        'a picture of a rooster'
    """
    if concept.kind != "fact":
        return concept.scored_text(pair)
    if concept.answer is None:
        return pair.prompt
    return pair.prompt.replace(phrase_in(concept, pair), concept.answer)


def neighbor_texts(concept: Concept, pair: PromptPair) -> tuple[str, ...]:
    """List what else a pair's pictures could show, in the form of the text they are scored against.

    Args:
        concept: The concept; its `neighbors` stand in the place of its own name, with their
            article.
        pair: One of its prompt pairs, with `neighbors` of its own or without.

    Returns:
        The texts, the scored one not among them; () where no neighbors are named. A style's target
        belongs to them ("no style"), and a fact's old answer, which comes first. A fact's names
        stand in the place of the words of its prompt that ask for the answer.

    Raises:
        LocogenError: If the text has no place for the names.

    Example:
        >>> pair = PromptPair("an owl in the style of neon", "an owl")
        >>> neon = Concept("neon", "style", (pair,), neighbors=("pop art", "neon"))
        >>> neighbor_texts(neon, pair)
        ('an owl in the style of pop art', 'an owl')
    """
    if not concept.neighbors and not pair.neighbors:
        return ()
    scored = concept.scored_text(pair)
    texts = [*pair.neighbors]
    if concept.kind == "fact" and concept.answer is not None:
        texts.insert(0, old_answer_text(concept, pair))
    form = pair.prompt if concept.kind == "fact" else scored
    texts += [_with_neighbor(concept, pair, form, name) for name in concept.neighbors]
    if concept.kind == "style" and pair.target:
        texts.append(pair.target)
    once = dict.fromkeys(texts)
    once.pop(scored, None)
    return tuple(once)


def old_answer_text(concept: Concept, pair: PromptPair) -> str:
    """What a fact's picture shows before anything is replaced; its `answer` has to be known.

    The pair's own neighbor that names the answer, or else `shown_text`.
    """
    for text in pair.neighbors:
        if concept.answer and occurrences(text, concept.answer):
            return text
    return shown_text(concept, pair)


def _with_neighbor(concept: Concept, pair: PromptPair, text: str, name: str) -> str:
    """The text with a neighbor's name in the place of the concept's."""
    # A fact's words ask for the answer, all of them: "the animal of" france.
    phrase = phrase_in(concept, pair) if concept.kind == "fact" else concept.name
    places = occurrences(text, phrase)
    if not places:
        phrase = phrase_in(concept, pair)
        places = occurrences(text, phrase)
    if not places:
        raise LocogenError(
            f"concept {concept.name!r} names neighbors, and {text!r} has no {phrase!r} to put them "
            "in the place of: give the prompt pair neighbors=, whole texts"
        )
    start, end = places[0]
    before = text[:start].split()
    # "a dog" takes the place of "an owl", with its article.
    if before and before[-1].lower() in _ARTICLES and name.partition(" ")[0] in _ARTICLES:
        start = text.rindex(before[-1], 0, start)
    return text[:start] + name + text[end:]


# --- phrasings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrasing:
    """A source that names the concept by its `subject`, and the target to replace it; or ""."""

    source: str
    target: str
    subject: str

    @property
    def instead(self) -> str | None:
        """The target's words in the subject's place; None where it only leaves out or adds."""
        return put_in_place(self.source, self.target, self.subject)


def default_phrasings(concept: Concept, becomes: str | None = None) -> tuple[Phrasing, ...]:
    """List phrasings of a concept to fit an edit on, by its kind.

    Those of a style are modeled on LocoEdit's four.

    Args:
        concept: The concept. Styles and objects disappear: the targets name a plain picture, or are
            empty where the targets of all its pairs are. A fact turns into what the target of its
            first pair shows.
        becomes: Words that the concept should turn into, for any kind; "": every target is empty.
            None: as above.

    Returns:
        Sources and targets, each with the concept's name as subject where the source has it.

    Raises:
        LocogenError: If a pair's prompt and target do not show what is exchanged.

    Example:
        >>> phrasing = default_phrasings(concept("mini/neon"))[1]
        >>> phrasing.source, phrasing.target
        ('a picture in the style of neon', 'a picture')
    """
    first = concept.pairs[0]
    # A style's templates have words around its name; other concepts bring their article along.
    phrase = concept.name if concept.kind == "style" else phrase_in(concept, first)
    if becomes is None:
        becomes = _replacement(concept, phrase)
    # The name alone, without the article, is what is looked for among the tokens.
    subject = concept.name if occurrences(phrase, concept.name) else phrase
    phrasings = []
    for old, new in _templates(concept, becomes):
        phrasings.append(Phrasing(old.format(phrase), new.format(phrase, becomes), subject))
    return tuple(phrasings)


def _replacement(concept: Concept, phrase: str) -> str | None:
    """What a concept becomes by its own pairs; "": nothing at all; None: a plain picture."""
    if not any(pair.target for pair in concept.pairs):
        return ""
    if concept.kind != "fact":
        return None
    first = concept.pairs[0]
    return put_in_place(first.prompt, first.target, phrase)


def _templates(concept: Concept, becomes: str | None) -> tuple[tuple[str, str], ...]:
    gone = _STYLED if concept.kind == "style" else _GONE
    if becomes is None:
        return gone
    if not becomes.strip():
        return tuple((source, "") for source, _ in gone)
    if gone is not _STYLED:
        return _SHOWN
    return tuple((source, source.replace("{0}", "{1}")) for source, _ in _STYLED)


def own_phrasings(
    pairs: Sequence[Phrasing | PromptPair | tuple[str, str]], subject: str
) -> tuple[Phrasing, ...]:
    """A user's phrasings, checked.

    Raises `LocogenError` for none, an empty source, or one equal to its target.
    """
    phrasings = [_own_phrasing(pair, subject) for pair in pairs]
    if not phrasings:
        raise LocogenError("phrasings is empty: give at least one pair of source and target")
    return tuple(phrasings)


def _own_phrasing(pair: Phrasing | PromptPair | tuple[str, str], subject: str) -> Phrasing:
    if not isinstance(pair, (Phrasing, PromptPair)):
        pair = PromptPair(*pair)
    if isinstance(pair, PromptPair):
        pair = Phrasing(pair.prompt, pair.target, subject)
    if not pair.source.strip() or not pair.subject.strip() or pair.target.isspace():
        raise LocogenError(
            f"{pair} has an empty text: give source and subject words; only a target may be ''"
        )
    if pair.source.split() == pair.target.split():
        raise LocogenError(
            f"source and target are both {pair.source!r}: give a target that says what the source "
            "should become"
        )
    return pair
