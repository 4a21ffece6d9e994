"""How an edit is fitted: its options, the matrices, the rows that it is fitted on, its recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from locogen import __version__
from locogen.editing.closed_form import (
    Covariance,
    LowRank,
    null_space_factor,
    output_update,
    returning_map,
    shared_factor,
    to_float64,
    update,
)
from locogen.editing.weights import plain_name
from locogen.errors import LocogenError
from locogen.interventions.layer_inputs import TOKENS, LayerInputs, Tokens
from locogen.models.defaults import name_of
from locogen.models.families import denoiser_of, family_of, token_spans
from locogen.models.hooks import DenoisersInTurn
from locogen.models.layers import Layer, find_layers, select
from locogen.phrasings import Phrasing
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor


Matrices = Literal["kv", "v", "k"]
Side = Literal["input", "output"]
# How much the states that would bring a concept back are held: what `attack` holds them by too.
RETURN_RIDGE = 0.1


@dataclass(frozen=True)
class Options:
    """The settings of a fit, checked; `fit_edit` says what each of them means."""

    ridge: float = 0.01
    ridge_v: float | None = None
    tokens: Tokens = "last_subject"
    preserve: Sequence[str] = ()
    preserve_weight: float = 1.0
    null_space: bool = False
    ordinary: Sequence[str] = ()
    entry: bool = False
    filtered: bool = False
    anchored: bool = False
    augmented: int = 0
    matrices: Matrices = "kv"
    rounds: int = 0
    side: Side = "input"

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise LocogenError(f"tokens is {self.tokens!r}: use one of {', '.join(TOKENS)}")
        object.__setattr__(self, "preserve", _prompts(self.preserve, "preserve"))
        object.__setattr__(self, "ordinary", _prompts(self.ordinary, "ordinary"))
        self._check_null_space()
        self._check_side()
        if self.matrices not in get_args(Matrices):
            raise LocogenError(f"matrices is {self.matrices!r}: use 'kv', 'v' or 'k'")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 0:
            raise LocogenError(f"rounds is {self.rounds!r}: give a whole number from 0 up")
        if not 0 < self.preserve_weight < math.inf:
            raise LocogenError(
                f"preserve_weight is {self.preserve_weight}: give a finite number above 0"
            )

    def _check_null_space(self) -> None:
        if (self.filtered or self.anchored or self.augmented) and not self.null_space:
            raise LocogenError(
                "filtered, anchored and augmented choose what the null space keeps: give "
                "null_space=True too"
            )
        self._check_augmented()
        if self.null_space and not self.preserve:
            raise LocogenError(
                "null_space keeps the preserved prompts exactly: give some prompts in preserve="
            )
        if self.null_space and self.ordinary:
            raise LocogenError(
                "null_space and ordinary are two ways to keep other prompts: use only one of them"
            )

    def _check_augmented(self) -> None:
        if not isinstance(self.augmented, int) or self.augmented < 0:
            raise LocogenError(
                f"augmented is {self.augmented!r}: give a whole number from 0 up (SPEED uses 10)"
            )

    def _check_side(self) -> None:
        if self.side not in get_args(Side):
            raise LocogenError(f"side is {self.side!r}: use 'input' or 'output'")
        if self.side == "output" and (self.null_space or self.ordinary):
            raise LocogenError(
                "null_space and ordinary hold what a matrix reads, and side='output' changes what "
                "it says: leave them out, and give prompts in preserve="
            )

    def ridge_of(self, matrix: str) -> float:
        """λ of keys ("k") or values ("v")."""
        if matrix == "v" and self.ridge_v is not None:
            return self.ridge_v
        return self.ridge

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON holds them, for an edit's recipe."""
        values = dict(vars(self))
        values["preserve"] = list(self.preserve)
        values["ordinary"] = list(self.ordinary)
        return values


def _prompts(prompts: Sequence[str], name: str) -> tuple[str, ...]:
    # A text is a sequence too: each of its letters would be taken for a prompt.
    if isinstance(prompts, str):
        raise LocogenError(f"{name} is one text, {prompts!r}: give a list of prompts")
    others = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if others:
        raise LocogenError(
            f"{name} holds something of type {type(others[0]).__name__}: give prompts, as texts"
        )
    return tuple(prompts)


# --- what is edited ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix that reads text: the name of its weight, "k" or "v", and its layer.

    `layer` is None for the map by which text enters before or next to the layers.
    """

    weight_name: str
    kind: str
    layer: Layer | None


def layers_to_edit(
    pipe: Pipeline, indices: Iterable[int], *, may_be_none: bool = False
) -> list[Layer]:
    """The layers with these indices. Raises `LocogenError` for those that cannot be edited.

    Args:
        pipe: A pipeline of a known family.
        indices: Of layers, counted from 0.
        may_be_none: Whether there may be no index: then something else is edited.
    """
    if may_be_none and not isinstance(indices, str):
        indices = tuple(indices)
        if not indices:
            return []
    layers = find_layers(pipe)
    edited = select(layers, indices)
    joined = [layer.index for layer in edited if layer.joined]
    if joined:
        first_joined = min(layer.index for layer in layers if layer.joined)
        raise LocogenError(
            f"layers {joined} read text and picture with the same matrices, so an edit would "
            f"change both: {_remedy_for_joined(pipe, first_joined)}"
        )
    return edited


def reason_for_no_edit(pipe: Pipeline) -> str:
    """Why none of a pipeline's layers can be edited; empty where some can."""
    if all(layer.joined for layer in find_layers(pipe)):
        return (
            f"the layers of {family_of(pipe).name} read text and picture with the same matrices, "
            f"so an edit would change both; {_remedy_for_joined(pipe, 0)}"
        )
    return ""


def _remedy_for_joined(pipe: Pipeline, first_joined: int) -> str:
    if first_joined:
        return f"use layers below {first_joined}"
    remedy = "no layer can be edited"
    if family_of(pipe).text_projection is not None:
        remedy += ", but the map that the text passes before: layers=(), entry=True"
    return remedy


def what_instead(pipe: Pipeline) -> str:
    """What can be done to a model that some other way of removing a concept is not made for."""
    if not reason_for_no_edit(pipe):
        return "edit the model with fit_edit"
    clamping = "clamp its neurons, with find_neurons and clamp"
    if family_of(pipe).text_projection is None:
        return clamping
    return f"{clamping}, or edit the map that the text passes before: layers=(), entry=True"


def matrices_to_edit(pipe: Pipeline, layers: Iterable[Layer], options: Options) -> list[Matrix]:
    """The key and value matrices of the layers, and with `entry` the map outside of them."""
    family = family_of(pipe)
    # The names of the model as it is saved: a compiled one is the same model, and its edits fit
    # every other.
    paths: dict[Any, str] = {}
    for path, module in denoiser_of(pipe).named_modules():
        paths[module] = plain_name(path)

    matrices: list[Matrix] = []
    for layer in layers:
        for kind, module in family.matrices(layer.module).items():
            if kind not in options.matrices:
                continue
            matrices.append(Matrix(f"{paths[module]}.weight", kind, layer))
    if options.entry:
        if family.text_projection is None:
            raise LocogenError(
                f"{family.name} has no text projection outside its layers: leave out entry=True"
            )
        matrices.append(Matrix(f"{family.text_projection}.weight", "k", None))
    return matrices


# --- what it is fitted on ------------------------------------------------------------------------


def readers(pipe: Pipeline, options: Options) -> list[Matrix]:
    """Every matrix that reads text, whether or not it is edited; joint layers are left out."""
    layers = [layer for layer in find_layers(pipe) if not layer.joined]
    return matrices_to_edit(pipe, layers, replace(options, matrices="kv"))


@dataclass(eq=False)
class Fit:
    """Fits one matrix after another; what several of them share is computed once."""

    inputs: LayerInputs
    phrasings: Sequence[Phrasing]
    options: Options
    device: Any
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _returning: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _factors: dict[tuple[int, float, str], Tensor] = field(default_factory=dict)

    def add_returning(
        self,
        read: Sequence[Matrix],
        weights: Mapping[str, Tensor],
        changes: Mapping[str, LowRank],
    ) -> None:
        """Add rows: the states of which the edited matrices say what the old ones said of sources.

        RECE's round (Gong et al. 2024, arXiv 2407.12383): the next solve sends them to the same
        targets. Here all rows are solved for together, from the unedited weights.

        Args:
            read: Every matrix that reads text, edited or not: a state reaches all of them.
            weights: Their weights, (out, in) each.
            changes: What the edit is so far, by the weight's name.
        """
        by_key: dict[int, list[str]] = {}
        for matrix in read:
            by_key.setdefault(self.inputs.key(matrix.layer), []).append(matrix.weight_name)
        for key, (source, target) in self._rows.items():
            names = by_key[key]
            old = [weights[name] for name in names]
            new = [_changed(weights[name], changes.get(name)) for name in names]
            mapped = returning_map(old, new, ridge=RETURN_RIDGE).to(source)  # (width, width)
            self._returning.setdefault(key, []).append((source + source @ mapped.T, target))
        self._factors.clear()

    def change(self, matrix: Matrix, weight: Tensor) -> LowRank:
        """The change of one matrix, on the CPU; `weight` is the matrix itself, (out, in)."""
        ridge = self.options.ridge_of(matrix.kind)
        source, target = self.all_rows(matrix.layer)  # (rows, width) each
        if self.options.side == "output":
            change = output_update(
                weight,
                source,
                target,
                ridge=ridge,
                preserve=self._preserved(matrix.layer, source),
                preserve_weight=self.options.preserve_weight,
            )
            return LowRank(change.up.cpu(), change.down.cpu())
        # What is added to the preserved states depends on the matrix.
        augmented = matrix.weight_name if self.options.augmented else ""
        key = (self.inputs.key(matrix.layer), ridge, augmented)
        if key not in self._factors:
            self._factors[key] = self._factor(matrix.layer, source, ridge, weight)
        change = update(weight, source, target, self._factors[key])
        return LowRank(change.up.cpu(), change.down.cpu())

    def rows(self, layer: Layer | None) -> tuple[Tensor, Tensor]:
        """Source and target states of all phrasings, (rows, width) each."""
        import torch

        key = self.inputs.key(layer)
        if key not in self._rows:
            sources: list[Tensor] = []
            targets: list[Tensor] = []
            for phrasing in self.phrasings:
                edited, in_their_place = self.inputs.exchange(
                    phrasing.source,
                    phrasing.target,
                    phrasing.subject,
                    self.options.tokens,
                    phrasing.instead,
                )
                sources.append(self._states(phrasing.source, edited, layer))
                targets.append(self._states(phrasing.target, in_their_place, layer))
            source = torch.cat(sources).to(self.device)  # (rows, width)
            target = torch.cat(targets).to(self.device)  # (rows, width)
            self._rows[key] = (source, target)
        return self._rows[key]

    def all_rows(self, layer: Layer | None) -> tuple[Tensor, Tensor]:
        """Source and target states of all phrasings and rounds, (rows, width) each."""
        import torch

        rows = [self.rows(layer), *self._returning.get(self.inputs.key(layer), [])]
        sources, targets = zip(*rows, strict=True)
        return torch.cat(sources), torch.cat(targets)

    def _states(self, prompt: str, positions: Sequence[int], layer: Layer | None) -> Tensor:
        """What the matrices of a layer read at these positions of a prompt, (positions, width)."""
        if layer is None:
            return self.inputs.text_projection_input(prompt, positions)
        return self.inputs.states(prompt, layer)[list(positions)]

    def _factor(self, layer: Layer | None, source: Tensor, ridge: float, weight: Tensor) -> Tensor:
        """The factor of a matrix, (rows, width); without `augmented`, of all with the same λ."""
        import torch

        preserve = self._preserved(layer, source)  # (preserved rows, width)
        if self.options.null_space and preserve is not None:
            if self.options.filtered:
                preserve = self._disturbed(layer, preserve, ridge)
            if self.options.augmented:
                more = augmented_states(preserve, weight, self.options.augmented)
                more = self._disturbed(layer, more, ridge) if self.options.filtered else more
                preserve = torch.cat([preserve, more])
            if self.options.anchored:
                preserve = torch.cat([preserve, self._anchors(layer).to(source)])
            return null_space_factor(source, preserve, ridge=ridge)
        covariance: Tensor | None = None  # (width, width)
        if self.options.ordinary:
            covariance = self._covariance(layer).to(source)
        return shared_factor(
            source,
            ridge=ridge,
            preserve=preserve,
            preserve_weight=self.options.preserve_weight,
            covariance=covariance,
        )

    def _preserved(self, layer: Layer | None, like: Tensor) -> Tensor | None:
        """What the layer reads of the preserved prompts, (preserved rows, width); None: none."""
        import torch

        preserved: list[Tensor] = []
        for prompt in self.options.preserve:
            positions = self.inputs.places(prompt, self.options.tokens)
            preserved.append(self._states(prompt, positions, layer))
        return torch.cat(preserved).to(like) if preserved else None

    def _disturbed(self, layer: Layer | None, preserve: Tensor, ridge: float) -> Tensor:
        """The preserved rows that an edit without any would change more than the mean does.

        SPEED's filter (arXiv 2503.07392), by the change of the states that the matrices would
        read, so that all matrices share it, (kept rows, width).
        """
        source, target = self.all_rows(layer)  # (rows, width) each
        down = shared_factor(source, ridge=ridge)  # (rows, width)
        changes = (preserve @ down.T) @ (target - source)  # (preserved rows, width)
        sizes = changes.square().sum(1)  # (preserved rows,)
        return preserve[sizes >= sizes.mean()]

    def _anchors(self, layer: Layer | None) -> Tensor:
        """What every prompt holds: its start, and the mean of the empty prompt, (2, width)."""
        import torch

        positions = self.inputs.places("", "all")
        # Kolors pads in front and does not read it: its empty prompt is nothing but the start.
        start = positions[0] if positions else token_spans(self.inputs.pipe, "")[0].start
        anchors: list[Tensor] = []  # (width,) each
        # Families with T5 have no mark before the first word.
        if start > 0:
            anchors.append(self._states("", [start - 1], layer)[0])
        if positions:
            anchors.append(self._states("", positions, layer).mean(0))
        return torch.stack(anchors)

    def _covariance(self, layer: Layer | None) -> Tensor:
        """The second moment of what is read of ordinary captions, (width, width)."""
        covariance: Covariance | None = None
        for caption in self.options.ordinary:
            # All words and the end mark. The start mark is the same in every prompt, and padding
            # would outweigh the words.
            words = self.inputs.places(caption, "subject")
            positions = sorted({*words, *self.inputs.places(caption, "end")})
            states = self._states(caption, positions, layer)  # (positions, width)
            if covariance is None:
                covariance = Covariance(states.shape[1])
            covariance.add(states)
        assert covariance is not None  # there is at least one caption, see `_factor`
        return covariance.matrix()


def augmented_states(states: Tensor, weight: Tensor, times: int) -> Tensor:
    """Each state with noise along the direction that a matrix answers least, (times · rows, width).

    SPEED's augmentation (arXiv 2503.07392) of rank 1: c + ε p pᵀ with Gaussian ε and p the right
    singular vector of the smallest singular value (of the first `out` ones, where the matrix is
    wide). Where that value is small, the states nearly stay the same for the matrix. In a null
    space that is exact, as here, all of them span one direction more: p.

    Args:
        states: Preserved states, (rows, width).
        weight: The matrix, (out, width).
        times: How often each state is augmented; the noise has a fixed seed.
    """
    import torch

    matrix = to_float64(weight.detach()).to(states)  # (out, width)
    least = torch.linalg.svd(matrix, full_matrices=False).Vh[-1]  # (width,), p
    dice = torch.Generator().manual_seed(0)
    count = times * len(states)
    noise = torch.randn(count, states.shape[1], generator=dice, dtype=torch.float64).to(states)
    return states.repeat(times, 1) + (noise @ least)[:, None] * least


def _changed(weight: Tensor, change: LowRank | None) -> Tensor:
    """A weight with its change in float64; itself where it has none."""
    if change is None:
        return weight
    old = to_float64(weight)
    return old + change.change.to(old)


# --- how it was fitted ---------------------------------------------------------------------------


def recipe_of(
    pipe: Pipeline,
    phrasings: Sequence[Phrasing],
    options: Options,
    weights: Mapping[str, Tensor],
    changes: Mapping[str, LowRank],
) -> dict[str, Any]:
    """How an edit was fitted, on which model, and how large it is: plain data, for its file."""
    relative_change: dict[str, float] = {}
    rounding = 0.0
    for name, weight in weights.items():
        old = weight.detach().cpu().double()  # (out, in)
        change = changes[name].change  # (out, in)
        relative_change[name] = float(change.norm() / old.norm())
        # What is lost of the change when the sum is rounded to the weight's own type.
        rounded = (old + change).to(weight.dtype).double()
        lost = (rounded - old - change).norm() / change.norm().clamp_min(1e-300)
        rounding = max(rounding, float(lost))

    versions = {"locogen": __version__}
    for package in ("torch", "diffusers", "transformers"):
        versions[package] = version(package)
    encoder_config = getattr(getattr(pipe, "text_encoder", None), "config", None)
    recipe = {
        "phrasings": [vars(phrasing) for phrasing in phrasings],
        "options": options.as_dict(),
        "model": _model_name(pipe),
        "revision": getattr(encoder_config, "_commit_hash", None),
        "dtype": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}),
        "relative_change": relative_change,
        "rounding": rounding,
        "versions": versions,
    }
    return recipe | _about_files(pipe, changes)


def _about_files(pipe: Pipeline, names: Iterable[str]) -> dict[str, Any]:
    """What writing the edit as LoRA needs, so that it can be done without the model."""
    family = family_of(pipe)
    facts: dict[str, Any] = {
        "denoiser": family.denoiser,
        "loads_lora": hasattr(pipe, "load_lora_weights"),
    }
    parts = denoiser_of(pipe)
    if isinstance(parts, DenoisersInTurn):
        facts["in_turn"] = list(parts.names)
    if family.kohya_name is not None:
        denoiser = denoiser_of(pipe)
        facts["kohya_names"] = {
            name: family.kohya_name(denoiser, name.removesuffix(".weight")) for name in names
        }
    return facts


def _model_name(pipe: Pipeline) -> str:
    """The hub id, or the last two names of the folder: a shared file should not name the rest."""
    return "/".join(Path(name_of(pipe)).parts[-2:])
