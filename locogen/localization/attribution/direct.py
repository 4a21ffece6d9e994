"""The direct effect: what the target does at one denoising step, along the prompt's own path.

At a step, from the prompt's own latents, the denoiser is run again with the target in some layers.
What is explained is its output along d = v(all layers hear the target) - v(prompt): the conditional
half alone, before guidance. Rows of a `DirectLine` are (picture, step) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.interventions.indices import index_on
from locogen.localization.attribution.blending import POOLED, Blend, new_alphas
from locogen.localization.attribution.paths import Paths, run
from locogen.localization.attribution.quadrature import (
    Integral,
    Shares,
    gradients_along,
)
from locogen.models.families import denoiser_of
from locogen.models.hooks import Hook, before
from locogen.types import Module

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
# Positions of tokens, in FLUX and Krea 2: no row of the batch has its own.
SAME_FOR_ALL = ("txt_ids", "img_ids", "position_ids")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the denoiser was called with at a step, conditional rows alone."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    count: int  # rows
    denoiser: Module  # what was called: of denoisers that take turns, one

    def of(self, rows: Sequence[int]) -> Inputs:
        """Some of the rows, in any order, also repeated."""
        args = tuple(_picked(value, rows, self.count) for value in self.args)
        kwargs = {}
        for name, value in self.kwargs.items():
            kwargs[name] = value if name in SAME_FOR_ALL else _picked(value, rows, self.count)
        return Inputs(args, kwargs, len(rows), self.denoiser)

    @property
    def sample(self) -> Tensor:
        """The latents that the denoiser takes."""
        return (
            self.args[0] if self.args else self.kwargs.get("sample", self.kwargs["hidden_states"])
        )


def _picked(value: Any, rows: Sequence[int], count: int) -> Any:
    """These rows of an argument that has `count`, also inside of dictionaries; copies."""
    if isinstance(value, dict):
        return {name: _picked(inner, rows, count) for name, inner in value.items()}
    if not hasattr(value, "shape") or not value.ndim or len(value) != count:
        return value
    return value.detach()[index_on(value.device, rows)]


def inputs_along(paths: Paths, steps: Sequence[int]) -> dict[int, Inputs]:
    """Run the prompts (and with joint attention their targets), and keep the denoiser's inputs.

    Raises:
        LocogenError: A step is not there.
    """
    inputs_by_step: dict[int, Inputs] = {}

    def hooks_for(call: Call) -> list[Hook]:
        def keep(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            paths.cost.call(call)
            if not call.rows:
                return
            step = call.step()
            # A scheduler of second order calls the denoiser twice a step: the first call counts.
            if step in steps and step not in inputs_by_step:
                whole = Inputs(args, kwargs, call.rows.stop, module)
                inputs_by_step[step] = whole.of(call.rows)

        return [before(denoiser_of(paths.pipe, paths.blend.family), keep, "the denoiser")]

    with on_denoiser(paths.pipe, hooks_for):
        run(paths, gradients=False)
    missing = [step for step in steps if step not in inputs_by_step]
    if missing:
        raise LocogenError(
            f"steps {missing} are not there: the call has {paths.settings.num_inference_steps}"
        )
    return inputs_by_step


@dataclass(eq=False)
class DirectLine:
    """The line from prompt to target at one step: see `quadrature.Line`; a row is a picture."""

    paths: Paths
    inputs: Inputs
    heads: bool
    pooled: bool

    @property
    def _blend(self) -> Blend:
        return self.paths.blend

    def output(self, rows: Sequence[int], alphas: Sequence[float]) -> Tensor:
        """The denoiser's output with every layer of a row at its alpha, (rows, numbers)."""
        import torch

        inputs = self._inputs_of(rows)
        by_layer = self._alphas(alphas, heads=False)
        moment = self.paths.moment(range(len(rows)), rows, by_layer)
        with self._blend.hearing(moment), torch.no_grad():
            output = self._run(inputs, rows)
        self.paths.cost.forward(inputs.count)
        return output.flatten(1).cpu().double()

    def variants(self, row: int, places: Sequence[int], alpha: float = 1.0) -> Tensor:
        """One picture's output, each time with one layer alone at alpha, the others at the prompt.

        Returns:
            (places, numbers)
        """
        import torch

        rows = [row] * len(places)
        inputs = self._inputs_of(rows)
        device = inputs.sample.device
        alphas = {}
        for layer in places:
            hears = [alpha * (place == layer) for place in places]
            alphas[layer] = torch.tensor(hears, device=device).reshape(-1, 1, 1)
        moment = self.paths.moment(range(len(rows)), rows, alphas)
        with self._blend.hearing(moment), torch.no_grad():
            output = self._run(inputs, rows)
        self.paths.cost.forward(inputs.count)
        return output.flatten(1).cpu().double()

    def shares(self, rows: Sequence[int], alphas: Sequence[float], direction: Tensor) -> Shares:
        """The derivatives by each layer's alpha: see `quadrature.Line`."""
        import torch

        inputs = self._inputs_of(rows)
        by_layer = self._alphas(alphas, heads=self.heads)
        moment = self.paths.moment(range(len(rows)), rows, by_layer)
        # Gradients within the context too: with the denoiser's own checkpointing, blocks run again.
        with self._blend.hearing(moment), torch.enable_grad():
            output = self._run(inputs, rows)
            gradients = gradients_along(output, list(by_layer.values()), direction)
        self.paths.cost.gradient(inputs.count)
        by_place = dict(zip(by_layer, gradients, strict=True))
        return stacked([by_place], len(self._blend.layers), self.heads, self._blend)

    def _inputs_of(self, rows: Sequence[int]) -> Inputs:
        """The inputs of some pictures, behind which the targets' own runs come, if needed."""
        places = list(rows)
        if self._blend.is_joint:
            places += [self.paths.count + row for row in rows]
        return self.inputs.of(places)

    def _alphas(self, values: Sequence[float], *, heads: bool) -> dict[int, Tensor]:
        return new_alphas(
            self._blend,
            values,
            self.paths.tokens,
            heads=heads,
            pooled=self.pooled,
            device=self.inputs.sample.device,
            denoiser=self.inputs.denoiser,
        )

    def _run(self, inputs: Inputs, rows: Sequence[int]) -> Tensor:
        """The conditional output of the denoiser, (rows, ...)."""
        output = inputs.denoiser(*inputs.args, **inputs.kwargs)[0]
        # Some denoisers put out a variance too, behind the noise.
        return output[: len(rows), : inputs.sample.shape[1]]


def exact_shares(line: DirectLine) -> Integral:
    """What each layer does by itself, one row a layer: see `DirectLine.variants`.

    Layers that act together need not sum to 1: then `residual` is what they do only together.
    """
    paths = line.paths
    rows = range(paths.count)
    start = line.output(rows, [0.0] * paths.count)  # (rows, numbers)
    change = line.output(rows, [1.0] * paths.count) - start
    norm = change.norm(dim=1)  # (rows,)
    layers = len(paths.blend.layers)
    places = [*range(layers), *([POOLED] if line.pooled else [])]
    size = paths.settings.batch_size
    parts = []
    for row in rows:
        outputs = [line.variants(row, places[i : i + size]) for i in range(0, len(places), size)]
        moved = np.concatenate(outputs) - start[row].numpy()  # (places, numbers)
        square = max(float(norm[row]) ** 2, np.finfo(float).tiny)
        parts.append(moved @ change[row].numpy() / square)  # (places,)
    shares = np.stack(parts)  # (rows, places)
    return Integral(
        layers=shares[:, None, :layers, None, None],
        pooled=shares[:, layers:].sum(1, keepdims=True),
        residual=1 - shares.sum(1, keepdims=True),
        points=np.zeros((len(shares), 1), dtype=int),
        norm=norm.numpy()[:, None],
    )


def stacked(
    by_step: Sequence[Mapping[int, Tensor]], layers: int, heads: bool, blend: Blend
) -> Shares:
    """Gradients by place, one mapping a step, as arrays; layers with fewer heads are filled up."""
    most = max(blend.heads(layer) for layer in range(layers)) if heads else 1
    parts, pooled = [], []
    for gradients in by_step:
        of_layers = []
        # Of denoisers that take turns, the layers of the other ones have no gradient at this step.
        present = next(gradients[layer] for layer in range(layers) if layer in gradients)
        out_of_turn = present.new_zeros(*present.shape[:2], 1)
        for layer in range(layers):
            gradient = gradients.get(layer, out_of_turn)
            values = gradient.detach().cpu().double().numpy()  # (rows, tokens, heads)
            missing = most - values.shape[2]
            of_layers.append(np.pad(values, ((0, 0), (0, 0), (0, missing))))
        parts.append(np.stack(of_layers, axis=1))  # (rows, layers, tokens, heads)
        if POOLED in gradients:
            pooled.append(gradients[POOLED].detach().cpu().double().numpy().sum((1, 2)))
        else:
            pooled.append(np.zeros(len(parts[0])))
    return Shares(np.stack(parts, axis=1), np.stack(pooled, axis=1))
