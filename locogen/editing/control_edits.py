"""Control edits, which a claim about an edit must beat: at other layers, and about other words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, overload

from locogen.editing.closed_form import LowRank
from locogen.editing.edit import Edit
from locogen.editing.rivals.at_inference import AtInference
from locogen.errors import LocogenError
from locogen.models.layers import find_layers
from locogen.phrasings import Phrasing, occurrences, put_for
from locogen.plan import Concept, Window, windows
from locogen.types import Pipeline

SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # as tokenizers of bytes write it
Places = dict[str, tuple[int, ...]]  # names of controls → their layers


def control_edits(pipe: Pipeline, edit: Edit, *, draws: int = 3, seed: int = 0) -> dict[str, Edit]:
    """Fit the same edit elsewhere: at every other window, on random layers, and on all layers.

    All windows and random draws have as many layers as the edit. Layers that read text and picture
    by the same matrices (`Layer.joined`) cannot be edited and are left out.

    Args:
        pipe: The pipeline that the edit was fitted on.
        edit: The edit.
        draws: Number of draws of random layers, from those that the edit does not change.
        seed: Seed of the draws.

    Returns:
        Edits by a name for the table: "layers 2-3", "layers 7-8 (shares 8)" for a window that
        shares layers with the edit, "random layers 4, 9", "all layers".

    Raises:
        LocogenError: What is given is no `Edit`, and as `Edit.refit`.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3])
        >>> controls = control_edits(pipe, edit, draws=1)
        >>> list(controls)[:2] + list(controls)[-1:]
        ['layers 0-1', 'layers 1-2 (shares 2)', 'all layers']
    """
    if not isinstance(edit, Edit):
        raise LocogenError(
            f"control_edits fits an edit of matrices at other layers, and {_kind_of(edit)} is "
            "none: fit it there with edit_with(…, layers=), or compare it with its placebo()"
        )
    edited = set(edit.layers)
    layers = find_layers(pipe)
    editable = [layer.index for layer in layers if not layer.joined]
    places = _windows(len(layers), editable, edited)
    # Random layers come from those that the edit leaves alone: what shares some is partly the edit.
    places |= _random_layers(sorted(set(editable) - edited), len(edited), draws, seed)
    # More layers than the edit has: how much the whole model could change.
    places["all layers"] = tuple(editable)
    return {name: edit.refit(pipe, place) for name, place in places.items() if set(place) != edited}


@overload
def placebo_edit(
    pipe: Pipeline, edit: Edit, *, seed: int = 0, avoid: Iterable[str] | None = None
) -> Edit: ...


@overload
def placebo_edit(
    pipe: Pipeline, edit: AtInference, *, seed: int = 0, avoid: Iterable[str] | None = None
) -> AtInference: ...


def placebo_edit(
    pipe: Pipeline,
    edit: Edit | AtInference,
    *,
    seed: int = 0,
    avoid: Iterable[str] | None = None,
) -> Edit | AtInference:
    """Fit the same edit about random words, and make it as large: what an edit does in itself.

    What a concept becomes, such as a fact's new answer, is exchanged too: random words become as
    many other random words. Else every placebo of a fact would teach its answer.

    Args:
        pipe: The pipeline that the edit was fitted on.
        edit: The edit. Its layers and options stay, and so does the size of each matrix's change
            (Frobenius norm). Of what acts at inference: its own `placebo`.
        seed: Of the words, drawn from the tokenizer's.
        avoid: Texts whose words are not drawn, besides the edit's own and a fact's answers. None:
            the name, the answer and the neighbors of the edit's concepts, which an edit from a file
            does not know.

    Returns:
        The placebo.

    Raises:
        LocogenError: The tokenizer has too few other words, nothing changes for those drawn, or no
            placebo is known of what is given.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3])
        >>> placebo = placebo_edit(pipe, edit)
        >>> placebo.layers == edit.layers, "neon" in placebo.name
        (True, False)
    """
    if isinstance(edit, AtInference):
        return edit.placebo(pipe, seed, avoid)
    if not isinstance(edit, Edit) or "phrasings" not in edit.recipe:
        raise LocogenError(
            f"no placebo is known of {_kind_of(edit)}: give an edit with its recipe, as from "
            "fit_edit() or edit_with()"
        )
    phrasings = [Phrasing(**phrasing) for phrasing in edit.recipe["phrasings"]]
    texts = [*avoided(edit.concepts, avoid), *edit.recipe["options"]["preserve"]]
    for phrasing in phrasings:
        texts += [phrasing.source, phrasing.target]
    count = max(len(phrasing.subject.split()) for phrasing in phrasings)
    words = random_words(pipe, texts, count, seed)
    answers = _other_answers(pipe, phrasings, [*texts, words], seed)
    about = [vars(_about(phrasing, words, answers)) for phrasing in phrasings]
    fitted = replace(edit, recipe={**edit.recipe, "phrasings": about}).refit(pipe)

    changes: dict[str, LowRank] = {}
    for name, change in fitted.changes.items():
        size = float(change.change.norm())
        if not size:
            raise LocogenError(
                f"the placebo about {words!r} changes nothing in {name}: take another seed"
            )
        scale = float(edit.changes[name].change.norm()) / size
        changes[name] = LowRank(scale * change.up, change.down)
    return replace(fitted, name=f"placebo ({words})", changes=changes)


def _kind_of(edit: Any) -> str:
    if isinstance(edit, str):
        return repr(edit)
    name = type(edit).__name__
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def _other_answers(
    pipe: Pipeline, phrasings: Sequence[Phrasing], avoid: Sequence[str], seed: int
) -> dict[str, str]:
    """Random words for what a concept becomes, such as a fact's new answer, by these words."""
    by_subject: dict[str, set[str]] = {}
    for phrasing in phrasings:
        instead = (phrasing.instead or "").lower()
        by_subject.setdefault(phrasing.subject, set()).add(instead)
    answers: dict[str, str] = {}
    for instead in by_subject.values():
        # What takes the same words in every phrasing becomes them; a style only leaves a picture.
        answer = instead.pop() if len(instead) == 1 else ""
        if answer:
            article, names = _article_and_names(answer)
            # Not the words that take the subject's place, which the same seed would draw.
            words = random_words(pipe, [*avoid, *answers.values()], len(names), seed)
            if article in ("a", "an"):
                article = "an" if words[0] in "aeiou" else "a"
            answers[answer] = f"{article} {words}".strip()
    return answers


def _article_and_names(answer: str) -> tuple[str, list[str]]:
    first, *rest = answer.split()
    return (first, rest) if first in ("a", "an", "the") and rest else ("", [first, *rest])


def _about(phrasing: Phrasing, words: str, answers: dict[str, str]) -> Phrasing:
    """The phrasing with these words for its subject, and another answer in its target."""
    source = _exchanged(phrasing.source, phrasing.subject, words)
    if source == phrasing.source:
        raise LocogenError(
            f"{source!r} does not hold its subject {phrasing.subject!r}, so that no other words "
            "can take its place: fit the edit with subject=, words that each source has"
        )
    target = phrasing.target
    answer = (phrasing.instead or "").lower()
    if answer in answers:
        target = _exchanged(target, answer, answers[answer])
    return Phrasing(source, target, words)


def _exchanged(text: str, old: str, new: str) -> str:
    """The text with other words for some, whole words in any case; else for letters of a word."""
    places = occurrences(text, old)
    return put_for(text, places, new) if places else text.replace(old, new)


def avoided(concepts: Sequence[Concept], avoid: Iterable[str] | None) -> list[str]:
    """Texts whose words a placebo is not about, besides those of the fit.

    Args:
        concepts: What the real one is about; () if that is not known.
        avoid: Texts that are given; None: the names, answers and neighbors of the concepts. Those
            of a fact are always among them.
    """
    texts = [] if avoid is None else list(avoid)
    for concept in concepts:
        # A random word that is a fact's old answer would edit what its pictures show.
        if avoid is None or concept.kind == "fact":
            texts += [concept.name, concept.answer or "", *concept.neighbors]
    return texts


def random_words(pipe: Pipeline, avoid: Iterable[str], count: int, seed: int) -> str:
    """So many random words of the tokenizer that no text holds: what a placebo is about.

    Args:
        pipe: The pipeline.
        avoid: Texts whose words are not drawn.
        count: Number of words.
        seed: Of the draw.

    Raises:
        LocogenError: The tokenizer has too few other words.
    """
    pool = _words_of(pipe, avoid)
    if not pool and not _words_of(pipe, ()):
        raise LocogenError(
            f"no words are known of the tokenizer, a {type(pipe.tokenizer).__name__}: fit an edit "
            "with phrasings= about words of your own, and give that as the placebo"
        )
    if len(pool) < count:
        raise LocogenError(
            f"the tokenizer has {len(pool)} words that no text holds, and a placebo needs {count}: "
            "give fewer texts in avoid="
        )
    return " ".join(random.Random(seed).sample(pool, count))


def _words_of(pipe: Pipeline, texts: Iterable[str]) -> list[str]:
    """The tokenizer's whole words of three letters and more that no text holds, in order."""
    held = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    words = set()
    for piece in pipe.tokenizer.get_vocab():
        # CLIP marks the end of a word, T5 and Gemma its beginning, Qwen the space before it.
        word = piece.removesuffix("</w>").removeprefix("\N{LOWER ONE EIGHTH BLOCK}")
        word = word.removeprefix(SPACE)
        is_whole = word != piece and word.isalpha() and word.isascii() and word.islower()
        if is_whole and len(word) > 2 and word not in held:
            words.add(word)
    return sorted(words)


def _windows(count: int, editable: Sequence[int], edited: set[int]) -> Places:
    """Every window of as many layers as the edit has, its own among them."""
    places: Places = {}
    for window in windows(count, len(edited)):
        if set(window) <= set(editable):
            places[_name(window, edited)] = tuple(window)
    return places


def _name(window: Window, edited: set[int]) -> str:
    """A window's name; one that shares layers with the edit warns of that."""
    shared = sorted(set(window) & edited)
    return f"{window} (shares {_numbered(shared)})" if shared else str(window)


def _random_layers(unedited: Sequence[int], count: int, draws: int, seed: int) -> Places:
    if len(unedited) < count:
        return {}
    dice = random.Random(seed)
    samples = [tuple(sorted(dice.sample(unedited, count))) for _ in range(draws)]
    return {f"random layers {_numbered(sample)}": sample for sample in samples}


def _numbered(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
