"""Control edits: the same edit at other layers, which a claim about its layers must beat."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from locogen.editing.closed_form import LowRank
from locogen.editing.edit import Edit
from locogen.errors import LocogenError
from locogen.models.layers import find_layers
from locogen.plan import Window, windows
from locogen.types import Pipeline

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
        LocogenError: As `Edit.refit`.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3])
        >>> controls = control_edits(pipe, edit, draws=1)
        >>> list(controls)[:2] + list(controls)[-1:]
        ['layers 0-1', 'layers 1-2 (shares 2)', 'all layers']
    """
    edited = set(edit.layers)
    layers = find_layers(pipe)
    editable = [layer.index for layer in layers if not layer.joined]
    places = _windows(len(layers), editable, edited)
    # Random layers come from those that the edit leaves alone: what shares some is partly the edit.
    places |= _random_layers(sorted(set(editable) - edited), len(edited), draws, seed)
    # More layers than the edit has: how much the whole model could change.
    places["all layers"] = tuple(editable)
    return {name: edit.refit(pipe, place) for name, place in places.items() if set(place) != edited}


def placebo_edit(pipe: Pipeline, edit: Edit, *, seed: int = 0, avoid: Iterable[str] = ()) -> Edit:
    """Fit the same edit about random words, and make it as large: what an edit does in itself.

    Args:
        pipe: The pipeline that the edit was fitted on.
        edit: The edit. Its layers and options stay, and so does the size of each matrix's change
            (Frobenius norm).
        seed: Of the words, drawn from the tokenizer's.
        avoid: Texts whose words are not drawn, besides the edit's own.

    Returns:
        The placebo.

    Raises:
        LocogenError: The tokenizer has too few other words, or nothing changes for those drawn.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3])
        >>> placebo = placebo_edit(pipe, edit)
        >>> placebo.layers == edit.layers, "neon" in placebo.name
        (True, False)
    """
    phrasings = edit.recipe["phrasings"]
    texts = [*avoid, *edit.recipe["options"]["preserve"]]
    for phrasing in phrasings:
        texts += [phrasing["source"], phrasing["target"]]
    count = max(len(phrasing["subject"].split()) for phrasing in phrasings)
    words = random_words(pipe, texts, count, seed)
    about: list[dict[str, str]] = []
    for phrasing in phrasings:
        source = phrasing["source"].replace(phrasing["subject"], words)
        about.append({"source": source, "target": phrasing["target"], "subject": words})
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
        # CLIP marks the end of a word, T5 and Gemma its beginning.
        word = piece.removesuffix("</w>").removeprefix("\N{LOWER ONE EIGHTH BLOCK}")
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
