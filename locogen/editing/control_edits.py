"""Control edits: the same edit at other layers, which a claim about its layers must beat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from locogen.editing.edit import Edit
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
