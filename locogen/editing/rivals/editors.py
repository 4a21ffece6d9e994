"""Editors by name, each called alike: what removes a concept can be set side by side."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from locogen.editing.edit import Edit, fit_edit
from locogen.editing.evaluation import Applicable
from locogen.editing.neurons import find_neurons
from locogen.editing.rivals.at_inference import AtInference
from locogen.editing.rivals.orthogonal_values import OrthogonalValues, fit_orthogonal_values
from locogen.editing.rivals.steering import Steering, fit_steering
from locogen.errors import LocogenError, unknown
from locogen.interventions.clamping import Place, Selection, clamp
from locogen.models.layers import find_layers
from locogen.plan import Concept
from locogen.types import Pipeline

NEURONS = 50  # of each matrix, as published (Basu et al. 2024, section 6)
AUGMENTATIONS = 10  # of each preserved state, as published (Li et al. 2025)


@dataclass(frozen=True, eq=False)
class ClampedNeurons(AtInference):
    """Neurons that are clamped to their mean without the concept, within `applied` alone.

    Attributes:
        selection: The neurons.
    """

    selection: Selection

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have such neurons."""
        return tuple(sorted({layer for layer, _ in self.selection.channels}))

    def applied(self, pipe: Pipeline, strength: float = 1.0) -> AbstractContextManager[None]:
        """Within the context they are clamped; `strength` has to be 1."""
        if strength != 1:
            raise LocogenError(
                f"strength is {strength}: clamped neurons have the mean of prompts without the "
                "concept, no more and no less"
            )
        return clamp(pipe, self.selection)

    def placebo(self, pipe: Pipeline, seed: int = 0, avoid: Iterable[str] = ()) -> ClampedNeurons:
        """As many random neurons of each matrix, clamped alike: what clamping does in itself.

        Args:
            pipe: Not looked at.
            seed: Of the neurons.
            avoid: Not looked at: neurons are drawn, not words.

        Returns:
            The placebo.
        """
        dice = random.Random(seed)
        channels: dict[Place, tuple[int, ...]] = {}
        for place, selected in self.selection.channels.items():
            width = self.selection.without[place].shape[1]
            channels[place] = tuple(dice.sample(range(width), len(selected)))
        return ClampedNeurons(Selection(channels, self.selection.without))


@dataclass(frozen=True)
class Task:
    """What an editor is to do.

    Attributes:
        pipe: The pipeline, not edited.
        concept: What to remove.
        layers: Where the concept is: its carrier.
        preserve: Prompts that should stay.
        ordinary: Captions of ordinary pictures.
        seed: Of random choices.
        num_inference_steps: Denoising steps of the editors that look at pictures.
    """

    pipe: Pipeline
    concept: Concept
    layers: tuple[int, ...]
    preserve: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    seed: int = 0
    num_inference_steps: int = 20

    @property
    def editable(self) -> tuple[int, ...]:
        """All layers that can be edited."""
        return tuple(layer.index for layer in find_layers(self.pipe) if not layer.joined)

    def edit(self, layers: Iterable[int] | None = None, **options: Any) -> Edit:
        """The closed-form edit, at these layers or where the concept is."""
        return fit_edit(self.pipe, self.concept, layers=layers or self.layers, **options)


Editor = Callable[[Task], Applicable]


def _random_layers(task: Task, **options: Any) -> Edit:
    rest = [index for index in task.editable if index not in task.layers]
    if len(rest) < len(task.layers):
        raise LocogenError("there are too few other layers to draw from: edit fewer layers")
    layers = random.Random(task.seed).sample(rest, len(task.layers))
    return task.edit(sorted(layers), **options)


def _speed(task: Task, **options: Any) -> Edit:
    choices: dict[str, Any] = {"null_space": True, "filtered": True, "anchored": True}
    choices |= {"augmented": AUGMENTATIONS, "matrices": "v"}
    return task.edit(task.editable, preserve=task.preserve, **(choices | options))


def _values(task: Task, **options: Any) -> OrthogonalValues:
    unknown_options = set(options) - {"text", "threshold", "slope", "height"}
    _without_options("AdaVD", dict.fromkeys(sorted(unknown_options)))
    return fit_orthogonal_values(task.pipe, task.concept, **options)


def _without_options(editor: str, options: Mapping[str, Any]) -> None:
    if options:
        raise LocogenError(
            f"{editor} is no edit of matrices and takes no {', '.join(options)}: leave these out"
        )


def _steering(task: Task, **options: Any) -> Steering:
    _without_options("steering", options)
    return fit_steering(task.pipe, task.concept, num_inference_steps=task.num_inference_steps)


def _neurons(task: Task, **options: Any) -> ClampedNeurons:
    _without_options("neurons", options)
    return ClampedNeurons(find_neurons(task.pipe, task.concept, layers=task.layers).top(NEURONS))


_EDITORS: Mapping[str, Callable[..., Applicable]] = {
    "LocoEdit": lambda task, **options: task.edit(**options),
    "all layers": lambda task, **options: task.edit(task.editable, **options),
    "random layers": _random_layers,
    "UCE": lambda task, **options: task.edit(task.editable, preserve=task.preserve, **options),
    "LocoEdit, preserved": lambda task, **options: task.edit(preserve=task.preserve, **options),
    "covariance": lambda task, **options: task.edit(ordinary=task.ordinary, **options),
    "null space": lambda task, **options: task.edit(
        preserve=task.preserve, null_space=True, **options
    ),
    "SPEED": _speed,
    "steering": _steering,
    "AdaVD": _values,
    "neurons": _neurons,
}


def editors() -> tuple[str, ...]:
    """List the editors that `edit_with` knows.

    Returns:
        Their names. "LocoEdit": keys and values of the layers where the concept is. "all layers",
        "random layers": the same elsewhere. "UCE": all layers, prompts preserved; "LocoEdit,
        preserved": at the concept's layers. "covariance": directions of ordinary captions change
        less (MEMIT). "null space": preserved prompts exactly. "SPEED": the null space of the
        preserved prompts that would be disturbed, augmented, with what every prompt holds, values
        alone, all layers. "steering", "AdaVD": at inference, see `fit_steering` and
        `fit_orthogonal_values`. "neurons": clamped at inference.

    Example:
        >>> editors()[:3]
        ('LocoEdit', 'all layers', 'random layers')
    """
    return tuple(_EDITORS)


def edit_with(
    editor: str,
    pipe: Pipeline,
    concept: Concept,
    *,
    layers: Iterable[int],
    preserve: Sequence[str] = (),
    ordinary: Sequence[str] = (),
    seed: int = 0,
    num_inference_steps: int = 20,
    **options: Any,
) -> Applicable:
    """Remove a concept by an editor's name, all of them called alike.

    Args:
        editor: One of `editors()`.
        pipe: The pipeline, not edited.
        concept: What to remove.
        layers: A window, or indices of layers: where the concept is. Editors of all layers ignore
            it.
        preserve: Prompts that should stay, for editors that preserve some.
        ordinary: Captions of ordinary pictures, for "covariance".
        seed: Of "random layers".
        num_inference_steps: Denoising steps of "steering".
        options: `tokens`, `ridge` and more of `fit_edit`, for editors that are such edits; of
            "AdaVD" those of `fit_orthogonal_values`.

    Returns:
        An `Edit`, or what holds within its `applied` alone and cannot be exported as a LoRA.

    Raises:
        LocogenError: An unknown editor, no prompts for one that needs them, and as `fit_edit`.

    Example:
        >>> pipe = load("mini")
        >>> edit = edit_with("all layers", pipe, concept("mini/neon"), layers=[12, 13])
        >>> len(edit.layers)
        16
    """
    if editor not in _EDITORS:
        raise unknown("editor", editor, _EDITORS)
    for name, prompts in {"preserve": preserve, "ordinary": ordinary}.items():
        if isinstance(prompts, str):
            raise LocogenError(f"{name} is one text, {prompts!r}: give a list of prompts")
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise LocogenError(f"layers is {layers!r}: give indices, such as [12, 13], or a window")
    if editor in ("UCE", "LocoEdit, preserved", "null space", "SPEED") and not preserve:
        raise LocogenError(
            f"the editor {editor!r} keeps prompts as they are: give some in preserve="
        )
    if editor == "covariance" and not ordinary:
        raise LocogenError("covariance is of ordinary captions: give some in ordinary=")
    task = Task(
        pipe,
        concept,
        tuple(layers),
        preserve=tuple(preserve),
        ordinary=tuple(ordinary),
        seed=seed,
        num_inference_steps=num_inference_steps,
    )
    return _EDITORS[editor](task, **options)
