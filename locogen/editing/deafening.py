"""Deaf models: a concept edited out of every layer but a few, to try localizers on."""

from __future__ import annotations

from collections.abc import Iterable

from locogen.editing.edit import Edit, fit_edit
from locogen.errors import LocogenError
from locogen.models.layers import find_layers
from locogen.plan import Concept
from locogen.types import Pipeline


def deafen(
    pipe: Pipeline, concept: Concept, *, hearing: Iterable[int] = (), ridge: float = 0.01
) -> Edit:
    """Fit an edit after which only some layers hear a concept: where it comes in is then known.

    It is the closed-form edit of `fit_edit` at all other layers, without any training. A localizer
    should find nobody where no layer goes on hearing, and otherwise nothing outside of these
    layers. Whether they suffice for a picture depends on the model.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What the layers become deaf to.
        hearing: A window, or indices of the layers that go on hearing it; none: nobody hears it.
        ridge: λ of the edit, see `fit_edit`.

    Returns:
        The edit: `with edit.applied(pipe):` the model is deaf, and after it as before.

    Raises:
        LocogenError: For a layer that the model does not have, all layers, and as `fit_edit` does.

    Example:
        >>> pipe = load("mini")
        >>> edit = deafen(pipe, concept("mini/neon"), hearing=range(2, 16))
        >>> edit.layers
        (0, 1)
    """
    indices = [layer.index for layer in find_layers(pipe)]
    hearing_layers = {int(layer) for layer in hearing}
    strangers = sorted(hearing_layers - set(indices))
    if strangers:
        raise LocogenError(
            f"hearing names layer {strangers[0]}, and the model has {len(indices)}: "
            f"use indices from 0 to {len(indices) - 1}"
        )
    deaf = [index for index in indices if index not in hearing_layers]
    if not deaf:
        raise LocogenError("all layers go on hearing: leave at least one out of hearing=")
    return fit_edit(pipe, concept, layers=deaf, ridge=ridge)
