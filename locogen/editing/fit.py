"""How an edit is fitted: its options, the matrices, the rows that it is fitted on, its recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from locogen import __version__
from locogen.editing.closed_form import (
    Covariance,
    LowRank,
    null_space_factor,
    shared_factor,
    update,
)
from locogen.editing.weights import plain_name
from locogen.errors import LocogenError
from locogen.interventions.layer_inputs import TOKENS, LayerInputs, Tokens
from locogen.models.defaults import name_of
from locogen.models.families import denoiser_of, family_of
from locogen.models.layers import Layer, find_layers, select
from locogen.phrasings import Phrasing
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor


Matrices = Literal["kv", "v"]


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
    matrices: Matrices = "kv"

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise LocogenError(f"tokens is {self.tokens!r}: use one of {', '.join(TOKENS)}")
        object.__setattr__(self, "preserve", _prompts(self.preserve, "preserve"))
        object.__setattr__(self, "ordinary", _prompts(self.ordinary, "ordinary"))
        self._check_null_space()
        if self.matrices not in get_args(Matrices):
            raise LocogenError(f"matrices is {self.matrices!r}: use 'kv' or 'v'")
        if not 0 < self.preserve_weight < math.inf:
            raise LocogenError(
                f"preserve_weight is {self.preserve_weight}: give a finite number above 0"
            )

    def _check_null_space(self) -> None:
        if (self.filtered or self.anchored) and not self.null_space:
            raise LocogenError(
                "filtered and anchored choose what the null space keeps: give null_space=True too"
            )
        if self.null_space and not self.preserve:
            raise LocogenError(
                "null_space keeps the preserved prompts exactly: give some prompts in preserve="
            )
        if self.null_space and self.ordinary:
            raise LocogenError(
                "null_space and ordinary are two ways to keep other prompts: use only one of them"
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


def layers_to_edit(pipe: Pipeline, indices: Iterable[int]) -> list[Layer]:
    """The layers with these indices. Raises `LocogenError` for those that cannot be edited."""
    layers = find_layers(pipe)
    edited = select(layers, indices)
    joined = [layer.index for layer in edited if layer.joined]
    if joined:
        first_joined = min(layer.index for layer in layers if layer.joined)
        remedy = f"use layers below {first_joined}" if first_joined else "no layer can be edited"
        raise LocogenError(
            f"layers {joined} read text and picture with the same matrices, so an edit would "
            f"change both: {remedy}"
        )
    return edited


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


@dataclass(eq=False)
class Fit:
    """Fits one matrix after another; what several of them share is computed once."""

    inputs: LayerInputs
    phrasings: Sequence[Phrasing]
    options: Options
    device: Any
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _factors: dict[tuple[int, float], Tensor] = field(default_factory=dict)

    def change(self, matrix: Matrix, weight: Tensor) -> LowRank:
        """The change of one matrix, on the CPU; `weight` is the matrix itself, (out, in)."""
        ridge = self.options.ridge_of(matrix.kind)
        source, target = self.rows(matrix.layer)  # (rows, width) each
        key = (self.inputs.key(matrix.layer), ridge)
        if key not in self._factors:
            self._factors[key] = self._factor(matrix.layer, source, ridge)
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

    def _states(self, prompt: str, positions: Sequence[int], layer: Layer | None) -> Tensor:
        """What the matrices of a layer read at these positions of a prompt, (positions, width)."""
        if layer is None:
            return self.inputs.text_projection_input(prompt, positions)
        return self.inputs.states(prompt, layer)[list(positions)]

    def _factor(self, layer: Layer | None, source: Tensor, ridge: float) -> Tensor:
        """The factor that all matrices of a layer with the same λ share, (rows, width)."""
        import torch

        preserve: Tensor | None = None  # (preserved rows, width)
        if self.options.preserve:
            preserved: list[Tensor] = []
            for prompt in self.options.preserve:
                positions = self.inputs.places(prompt, self.options.tokens)
                preserved.append(self._states(prompt, positions, layer))
            preserve = torch.cat(preserved).to(source)
        if self.options.null_space and preserve is not None:
            if self.options.filtered:
                preserve = self._disturbed(layer, preserve, ridge)
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

    def _disturbed(self, layer: Layer | None, preserve: Tensor, ridge: float) -> Tensor:
        """The preserved rows that an edit without any would change more than the mean does.

        SPEED's filter (arXiv 2503.07392), by the change of the states that the matrices would
        read, so that all matrices share it, (kept rows, width).
        """
        source, target = self.rows(layer)  # (rows, width) each
        down = shared_factor(source, ridge=ridge)  # (rows, width)
        changes = (preserve @ down.T) @ (target - source)  # (preserved rows, width)
        sizes = changes.square().sum(1)  # (preserved rows,)
        return preserve[sizes >= sizes.mean()]

    def _anchors(self, layer: Layer | None) -> Tensor:
        """What every prompt holds: its start, and the mean of the empty prompt, (2, width)."""
        import torch

        positions = self.inputs.places("", "all")
        anchors = [self._states("", positions, layer).mean(0)]  # (width,)
        # Families with T5 have no mark before the first word.
        if positions[0] > 0:
            anchors.insert(0, self._states("", [positions[0] - 1], layer)[0])
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
    if family.kohya_name is not None:
        denoiser = denoiser_of(pipe)
        facts["kohya_names"] = {
            name: family.kohya_name(denoiser, name.removesuffix(".weight")) for name in names
        }
    return facts


def _model_name(pipe: Pipeline) -> str:
    """The hub id, or the last two names of the folder: a shared file should not name the rest."""
    return "/".join(Path(name_of(pipe)).parts[-2:])
