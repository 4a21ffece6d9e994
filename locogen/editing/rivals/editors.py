"""Editors by name, each called alike: what removes a concept can be set side by side."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen import markup
from locogen.editing.edit import Edit, fit_edit
from locogen.editing.evaluation import Applicable
from locogen.editing.files import read_recorded, write_recorded
from locogen.editing.fit import reason_for_no_edit
from locogen.editing.neurons import find_neurons
from locogen.editing.rivals.at_inference import AtInference
from locogen.editing.rivals.orthogonal_values import OrthogonalValues, fit_orthogonal_values
from locogen.editing.rivals.steering import Steering, fit_steering
from locogen.errors import LocogenError, unknown
from locogen.interventions.clamping import Place, Selection, clamp
from locogen.models.layers import find_layers, select
from locogen.plan import Concept, one_concept
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

NEURONS = 50  # of each matrix, as published (Basu et al. 2024, section 6)
AUGMENTATIONS = 10  # of each preserved state, as published (Li et al. 2025)
NEURONS_FORMAT = 1  # of the file; raised when its meaning changes


@dataclass(frozen=True, eq=False)
class ClampedNeurons(AtInference):
    """Neurons that are clamped to their mean without the concept, within `applied` alone.

    Attributes:
        selection: The neurons.

    Example:
        >>> pipe = load("mini")
        >>> of = {"layers": [12, 13], "number": 8}
        >>> clamped = edit_with("neurons", pipe, concept("mini/neon").first(2), **of)
        >>> clamped.layers, len(clamped.selection), f"{max(clamped.shares.values()):.2f}"
        ((12, 13), 32, '0.12')
    """

    selection: Selection

    @property
    def shares(self) -> dict[Place, float]:
        """Which share of each matrix's neurons is clamped, by (layer, matrix)."""
        shares: dict[Place, float] = {}
        for place, selected in self.selection.channels.items():
            shares[place] = len(selected) / self.selection.without[place].shape[1]
        return shares

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

    def placebo(
        self, pipe: Pipeline, seed: int = 0, avoid: Iterable[str] | None = None
    ) -> ClampedNeurons:
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

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Args:
            path: The file to write.

        Raises:
            LocogenError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        channels: list[list[Any]] = []
        for (layer, matrix), selected in self.selection.channels.items():
            channels.append([layer, matrix, list(selected)])
            tensors[f"{layer} {matrix}"] = self.selection.without[layer, matrix]
        record = {"format": NEURONS_FORMAT, "channels": channels}
        write_recorded(Path(path), "neurons", record, tensors)

    @classmethod
    def load(cls, path: str | Path) -> ClampedNeurons:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The clamped neurons.

        Raises:
            LocogenError: There is no such file, or it is from another program or a later format.
        """
        record, tensors = read_recorded(Path(path), "neurons", NEURONS_FORMAT)
        channels: dict[Place, tuple[int, ...]] = {}
        without: dict[Place, Tensor] = {}
        for layer, matrix, selected in record["channels"]:
            channels[layer, matrix] = tuple(selected)
            without[layer, matrix] = tensors[f"{layer} {matrix}"]
        return cls(Selection(channels, without))

    def _repr_html_(self) -> str:
        shares = self.shares.values() or [0.0]
        facts = {
            "clamped neurons": len(self.selection),
            "layers": ", ".join(map(str, self.layers)),
            "of each matrix": f"{markup.percent(min(shares))} to {markup.percent(max(shares))}",
        }
        return markup.shown("facts", facts=facts)


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
        few = f"there are {len(rest)} other layers to draw {len(task.layers)} from"
        # Where none can be edited, fewer layers would not help.
        raise LocogenError(f"{few}: {reason_for_no_edit(task.pipe) or 'edit fewer layers'}")
    layers = random.Random(task.seed).sample(rest, len(task.layers))
    return task.edit(sorted(layers), **options)


def _speed(task: Task, **options: Any) -> Edit:
    choices: dict[str, Any] = {"null_space": True, "filtered": True, "anchored": True}
    choices |= {"augmented": AUGMENTATIONS, "matrices": "v"}
    return task.edit(task.editable, preserve=task.preserve, **(choices | options))


def _values(task: Task, **options: Any) -> OrthogonalValues:
    return fit_orthogonal_values(task.pipe, task.concept, **options)


def _steering(task: Task) -> Steering:
    return fit_steering(task.pipe, task.concept, num_inference_steps=task.num_inference_steps)


def _neurons(task: Task, number: int = NEURONS) -> ClampedNeurons:
    neurons = find_neurons(task.pipe, task.concept, layers=task.layers)
    most = min(means.shape[1] for means in neurons.without.values())
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
        raise LocogenError(
            f"number is {number!r}: give how many neurons of each matrix to clamp, from 1 to "
            f"{most}, which the narrowest of these layers' matrices has"
        )
    return ClampedNeurons(neurons.top(number))


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
# Editors that need prompts to keep, or captions; and those that act where the concept is.
PRESERVING = ("UCE", "LocoEdit, preserved", "null space", "SPEED")
AT_THE_LAYERS = (
    *("LocoEdit", "random layers", "LocoEdit, preserved"),
    *("covariance", "null space", "neurons"),
)
# Options of editors that are no edits of matrices; the others take those of `fit_edit`.
OTHER_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "steering": (),
    "AdaVD": ("text", "threshold", "slope", "height"),
    "neurons": ("number",),
}
# What an editor of matrices is given by its name, or by arguments of `edit_with`.
GIVEN = ("pipe", "concept", "layers", "preserve", "ordinary")


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
            "AdaVD" those of `fit_orthogonal_values`; of "neurons" their `number` in each matrix:
            50, as published for matrices of 320 to 1280, is most of one with 64.

    Returns:
        An `Edit`, or what holds within its `applied` alone and cannot be exported as a LoRA.

    Raises:
        LocogenError: An unknown editor or option, a layer that the model does not have, more
            neurons than a matrix has, no prompts for an editor that needs them, and as `fit_edit`.

    Example:
        >>> pipe = load("mini")
        >>> edit = edit_with("all layers", pipe, concept("mini/neon"), layers=[12, 13])
        >>> len(edit.layers)
        16
    """
    if editor not in _EDITORS:
        raise unknown("editor", editor, _EDITORS)
    _check_options(editor, options)
    _check_prompts(editor, preserve=preserve, ordinary=ordinary)
    if editor in OTHER_OPTIONS:
        one_concept(concept)
    task = Task(
        pipe,
        concept,
        _distinct_layers(editor, pipe, layers),
        preserve=tuple(preserve),
        ordinary=tuple(ordinary),
        seed=seed,
        num_inference_steps=num_inference_steps,
    )
    return _EDITORS[editor](task, **options)


def _check_options(editor: str, options: Mapping[str, Any]) -> None:
    """Refuse options that an editor does not have, or that its name has decided."""
    if editor in OTHER_OPTIONS:
        others = [name for name in options if name not in OTHER_OPTIONS[editor]]
        if others:
            raise LocogenError(
                f"{editor} is no edit of matrices and takes no {', '.join(others)}: leave these out"
            )
        return
    _check_options_of_fit(editor, options)
    if editor == "null space" and "null_space" in options:
        raise LocogenError("null space is what this editor is: leave null_space= out")


def _check_options_of_fit(editor: str, options: Mapping[str, Any]) -> None:
    of_fit = [name for name in inspect.signature(fit_edit).parameters if name not in GIVEN]
    for name in options:
        if name not in of_fit:
            raise unknown(f"option of {editor}", name, of_fit)


def _check_prompts(editor: str, **prompts: Sequence[str]) -> None:
    """Refuse one text for several, and no prompts for an editor that needs some."""
    for name, texts in prompts.items():
        if isinstance(texts, str):
            raise LocogenError(f"{name} is one text, {texts!r}: give a list of prompts")
    if editor in PRESERVING and not prompts["preserve"]:
        raise LocogenError(
            f"the editor {editor!r} keeps prompts as they are: give some in preserve="
        )
    if editor == "covariance" and not prompts["ordinary"]:
        raise LocogenError("covariance is of ordinary captions: give some in ordinary=")


def _distinct_layers(editor: str, pipe: Pipeline, layers: Iterable[int]) -> tuple[int, ...]:
    """The layers that the model has, none twice; may be none for editors that ignore them."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise LocogenError(f"layers is {layers!r}: give indices, such as [12, 13], or a window")
    indices = tuple(layers)
    if not indices and editor not in AT_THE_LAYERS:
        return ()
    return tuple(layer.index for layer in select(find_layers(pipe), indices))
