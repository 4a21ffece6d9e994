"""Integrate gradients along the line from prompt to target, until their sum is what it must be.

By completeness (Sundararajan et al. 2017, arXiv 1703.01365) the integrated shares of all layers sum
to what the target does in all layers together: 1, in its own units. How far a sum is from 1 is a
test of the quadrature that needs nothing beyond the two ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from locogen.errors import LocogenError

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
FIRST_SCALES = (1.0, 2.0**-8, 2.0**-16)  # of gradients in float16, each where the last overflowed


class Shares(NamedTuple):
    """Derivatives by alpha: `layers` as (rows, places, tokens, heads), `pooled` as (rows, places).

    Places are denoising steps and layers: (rows, steps, layers, tokens, heads), (rows, steps).
    """

    layers: Array
    pooled: Array


class Line(Protocol):
    """The line from prompt to target, for some rows."""

    def output(self, rows: Sequence[int], alpha: float) -> Tensor:
        """What is explained, at a point of the line, (rows, numbers), without gradients."""
        ...

    def shares(self, rows: Sequence[int], alpha: float, direction: Tensor) -> Shares:
        """The derivative of what is explained by each alpha, along a direction (rows, numbers)."""
        ...


@dataclass(frozen=True, eq=False)
class Integral:
    """Shares of some rows, and how far they may be trusted.

    Attributes:
        layers: (rows, steps, layers, tokens, heads)
        pooled: (rows, steps)
        residual: 1 - the sum of the shares, (rows, integrals): one a step, or one for all.
        points: How many points were taken, (rows, integrals)
        norm: How far prompt and target are apart, (rows, integrals)
    """

    layers: Array
    pooled: Array
    residual: Array
    points: Array
    norm: Array


def integrate(
    line: Line, rows: Sequence[int], *, points: int, bound: float, most_points: int
) -> Integral:
    """Integrate a line's shares, with more points for rows whose sum is too far from 1.

    Args:
        line: What to integrate.
        rows: Its rows.
        points: Points to begin with.
        bound: Largest distance of a row's sum from 1.
        most_points: Points are doubled up to this number.
    """
    import torch

    start = line.output(rows, 0.0).double()  # (rows, numbers)
    change = line.output(rows, 1.0).double() - start
    norm = torch.linalg.vector_norm(change, dim=1)  # (rows,)
    square = norm.square().clamp_min(torch.finfo(torch.float64).tiny)
    direction = change / square[:, None]

    integral = _integrated(line, rows, direction, points)
    layers, pooled = integral
    residual = _residual(integral)
    used = np.full(len(rows), points)
    count = points
    while count * 2 <= most_points:
        count *= 2
        missed = [i for i in range(len(rows)) if abs(residual[i]) > bound and norm[i] > 0]
        if not missed:
            break
        index = torch.tensor(missed, device=direction.device)
        finer = _integrated(line, [rows[i] for i in missed], direction[index], count)
        layers[missed], pooled[missed] = finer
        residual[missed] = _residual(finer)
        used[missed] = count
    apart = norm.numpy()
    return Integral(layers, pooled, residual[:, None], used[:, None], apart[:, None])


def _integrated(line: Line, rows: Sequence[int], direction: Tensor, points: int) -> Shares:
    # Gauss and Legendre's points: exact for polynomials up to degree 2 points - 1, and none of
    # them is an end, where a token that one of the texts does not have has no derivative.
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total: Shares | None = None
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        shares = line.shares(rows, float(node), direction)
        part = Shares(weight * shares.layers, weight * shares.pooled)
        if total is None:
            total = part
        else:
            total = Shares(total.layers + part.layers, total.pooled + part.pooled)
    assert total is not None
    return total


def _residual(shares: Shares) -> Array:
    """1 - the sum of each row's shares, (rows,)."""
    return 1 - shares.layers.sum((1, 2, 3, 4)) - shares.pooled.sum(1)


def gradients_along(output: Tensor, leaves: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    """The gradient of ⟨output, direction⟩ by each leaf, in float32; rows do not mix.

    Args:
        output: (rows, ...)
        leaves: Tensors with a row for each of `output`.
        direction: (rows, numbers of a row)

    Raises:
        LocogenError: A leaf was not used, or gradients are not finite.
    """
    import torch

    flat = output.flatten(1)
    if output.itemsize >= 4:
        gradients = torch.autograd.grad(flat, leaves, direction.to(flat), allow_unused=True)
        return _checked(gradients)

    # Sixteen bits: float16 has no numbers below 6e-8 and none above 65504. So each row's largest
    # entry begins at 1, and is made smaller where gradients overflow.
    largest = direction.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)  # (rows,)
    gradients = []
    for scale in FIRST_SCALES:
        scaled = direction * (scale / largest)[:, None]
        gradients = torch.autograd.grad(
            flat, leaves, scaled.to(flat), allow_unused=True, retain_graph=True
        )
        back = largest / scale  # (rows,)
        gradients = [_unscaled(one, back) for one in gradients]
        if all(bool(one.isfinite().all()) for one in gradients if one is not None):
            break
    return _checked(gradients)


def _unscaled(gradient: Tensor | None, factors: Tensor) -> Tensor | None:
    if gradient is None:
        return None
    column = factors.reshape(-1, *[1] * (gradient.ndim - 1))
    return gradient.cpu().double().mul(column.cpu()).float()


def _checked(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    checked = []
    for gradient in gradients:
        if gradient is None:
            raise LocogenError(
                "a layer's text was not read while gradients were taken: call the model's "
                "unfuse_qkv_projections() where projections are fused, and load adapters before"
            )
        if not bool(gradient.isfinite().all()):
            raise LocogenError(
                "gradients are not finite: load the model in bfloat16 or float32, or take "
                "how='rows', which needs none"
            )
        checked.append(gradient)
    return checked
