"""How an edit is fitted: its options, the rows that it is fitted on, and the factor that matrices share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from locogen.editing import closed_form as solve
from locogen.errors import LocogenError
from locogen.interventions.layer_inputs import TOKENS, LayerInputs, Tokens
from locogen.models.layers import Layer
from locogen.phrasings import Phrasing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """How an edit is fitted; see `fit_edit`."""

    ridge: float = 0.01
    ridge_v: float | None = None
    tokens: Tokens = "last_subject"
    preserve: tuple[str, ...] = ()
    preserve_weight: float = 1.0
    null_space: bool = False
    ordinary: tuple[str, ...] = ()
    entry: bool = False

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise LocogenError(f"tokens is {self.tokens!r}: take one of {', '.join(TOKENS)}")
        if self.null_space and not self.preserve:
            raise LocogenError(
                "null_space keeps the preserved prompts exactly: give preserve= some prompts"
            )
        if self.null_space and self.ordinary:
            raise LocogenError(
                "null_space and ordinary are two ways to keep the rest: give one of them"
            )
        if not 0 < self.preserve_weight < math.inf:
            raise LocogenError(
                f"preserve_weight is {self.preserve_weight}: give a finite number above 0"
            )
        for name in ("preserve", "ordinary"):
            if isinstance(getattr(self, name), str):
                raise LocogenError(
                    f"{name} is one text, {getattr(self, name)!r}: give a list of prompts"
                )
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(eq=False)
class Fit:
    """Rows and factors of a fit; what layers that read the same share is computed once."""

    reader: LayerInputs
    told: Sequence[Phrasing]
    options: Options
    device: Any
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _downs: dict[tuple[int, float], Tensor] = field(default_factory=dict)

    def change(self, weight: Tensor, layer: Layer | None, matrix: str) -> solve.LowRank:
        """The change of one matrix that reads what the layer reads; None: of the map beside the layers."""
        ridge = (
            self.options.ridge_v
            if matrix == "v" and self.options.ridge_v is not None
            else self.options.ridge
        )
        source, target = self.rows(layer)
        key = (self.reader.key(layer), ridge)
        if key not in self._downs:
            self._downs[key] = self._down(layer, source, ridge)
        found = solve.updates([weight], source, target, self._downs[key])[0]
        return solve.LowRank(found.up.cpu(), found.down.cpu())

    def rows(self, layer: Layer | None) -> tuple[Tensor, Tensor]:
        """Source and target states of every phrasing, (rows, width) each."""
        import torch

        key = self.reader.key(layer)
        if key not in self._rows:
            found = []
            for phrasing in self.told:
                words = (phrasing.source, phrasing.target, phrasing.subject)
                old, new = self.reader.exchange(*words, self.options.tokens, phrasing.instead)
                found.append(
                    (
                        self._read(phrasing.source, old, layer),
                        self._read(phrasing.target, new, layer),
                    )
                )
            source, target = zip(*found, strict=True)
            self._rows[key] = torch.cat(source).to(self.device), torch.cat(target).to(self.device)
        return self._rows[key]

    def _read(self, prompt: str, places: Sequence[int], layer: Layer | None) -> Tensor:
        if layer is None:
            return self.reader.text_projection_input(prompt, places)
        return self.reader.states(prompt, layer)[list(places)]

    def _down(self, layer: Layer | None, source: Tensor, ridge: float) -> Tensor:
        """The factor that all matrices of one λ share."""
        import torch

        options = self.options
        kept = [
            self._read(p, self.reader.places(p, options.tokens), layer) for p in options.preserve
        ]
        preserve = torch.cat(kept).to(source) if kept else None
        if options.null_space and preserve is not None:
            return solve.null_space_reader(source, preserve, ridge=ridge)
        covariance = self._ordinary(layer).to(source) if options.ordinary else None
        weight = options.preserve_weight
        return solve.reader(
            source, ridge=ridge, preserve=preserve, preserve_weight=weight, covariance=covariance
        )

    def _ordinary(self, layer: Layer | None) -> Tensor:
        """The covariance of what is read of ordinary captions, start mark and padding left out, (width, width)."""
        gathered = None
        for caption in self.options.ordinary:
            ends = self.reader.places(caption, "subject") + self.reader.places(caption, "end")
            rows = self._read(caption, sorted(set(ends)), layer)
            gathered = (gathered or solve.Covariance(rows.shape[1])).add(rows)
        assert gathered is not None
        return gathered.matrix()
