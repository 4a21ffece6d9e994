"""Control edits: the same edit at other layers, which a claim about its layers must beat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from locogen.editing.edit import Edit
from locogen.models.layers import Layer, find_layers
from locogen.plan import windows
from locogen.types import Pipeline


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
    controls: dict[str, Edit] = {}
    for name, layers in _places(find_layers(pipe), edit.layers, draws, seed).items():
        if set(layers) != set(edit.layers):
            controls[name] = edit.refit(pipe, layers)
    return controls


def _places(
    model_layers: Sequence[Layer], edited: Sequence[int], draws: int, seed: int
) -> dict[str, tuple[int, ...]]:
    """Names and layers of all controls; the edit's own window may be among them."""
    editable = [layer.index for layer in model_layers if not layer.joined]
    places: dict[str, tuple[int, ...]] = {}
    for window in windows(len(model_layers), len(edited)):
        if not set(window) <= set(editable):
            continue
        name = str(window)
        # A control that shares layers with the edit is partly the edit: its name warns of that.
        shared = sorted(set(window) & set(edited))
        if shared:
            name += f" (shares {_listed(shared)})"
        places[name] = tuple(window)

    # Random layers come from those that the edit leaves alone, for the same reason.
    unedited = [index for index in editable if index not in edited]
    has_enough = len(unedited) >= len(edited)
    dice = random.Random(seed)
    for _ in range(draws if has_enough else 0):
        sample = tuple(sorted(dice.sample(unedited, len(edited))))
        places[f"random layers {_listed(sample)}"] = sample

    # More layers than the edit has: how much the whole model could change.
    places["all layers"] = tuple(editable)
    return places


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
