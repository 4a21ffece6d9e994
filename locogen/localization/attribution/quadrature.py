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

    def output(self, rows: Sequence[int], alphas: Sequence[float]) -> Tensor:
        """What is explained, at a point of each row, (rows, numbers), without gradients."""
        ...

    def shares(self, rows: Sequence[int], alphas: Sequence[float], direction: Tensor) -> Shares:
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


@dataclass(frozen=True, eq=False)
class _Interval:
    """A part of one row's line, and the shares that were integrated over it."""

    low: float
    high: float
    change: float  # of what is explained, from one end to the other
    layers: Array  # (steps, layers, tokens, heads)
    pooled: Array  # (steps,)

    @property
    def error(self) -> float:
        """How far the shares are from what they must sum to."""
        return self.change - float(self.layers.sum() + self.pooled.sum())


def integrate(
    line: Line, rows: Sequence[int], *, points: int, bound: float, most_points: int
) -> Integral:
    """Integrate a line's shares, with more points for rows whose sum is too far from 1.

    Completeness holds for each part of the line too, between its own ends: so the part where the
    sum is most at fault, as where a picture tips over, is the one that is halved.

    Args:
        line: What to integrate.
        rows: Its rows.
        points: Points on the whole line, and on each half of a part that is halved.
        bound: Largest distance of a row's sum from 1.
        most_points: No more points a row than these.
    """
    path = _path(line, rows)
    whole = _integrated(line, rows, [(0.0, 1.0, 1.0)] * len(rows), path.direction, points)
    parts = [[interval] for interval in whole]  # by row
    used = np.full(len(rows), points)
    while True:
        may_have_more = (path.norm > 0) & (used + 2 * points <= most_points)  # (rows,)
        is_missed = np.array([abs(_error(row)) > bound for row in parts])
        missed = np.flatnonzero(may_have_more & is_missed).tolist()
        if not missed:
            break
        _halve_worst(line, rows, path, parts, missed, points)
        used[missed] += 2 * points
    return Integral(
        layers=np.stack([sum(part.layers for part in row) for row in parts]),
        pooled=np.stack([sum(part.pooled for part in row) for row in parts]),
        residual=np.array([[_error(row)] for row in parts]),
        points=used[:, None],
        norm=path.norm[:, None],
    )


class _Path(NamedTuple):
    """The two ends of each row's line."""

    start: Tensor  # what is explained at the prompt, (rows, numbers)
    direction: Tensor  # along which shares are taken: 1 from end to end, (rows, numbers)
    norm: Array  # how far the ends are apart, (rows,)


def _path(line: Line, rows: Sequence[int]) -> _Path:
    import torch

    start = line.output(rows, [0.0] * len(rows))  # (rows, numbers)
    change = line.output(rows, [1.0] * len(rows)) - start
    norm = torch.linalg.vector_norm(change, dim=1)  # (rows,)
    square = norm.square().clamp_min(torch.finfo(torch.float64).tiny)
    return _Path(start, change / square[:, None], norm.numpy())


def _halve_worst(
    line: Line,
    rows: Sequence[int],
    path: _Path,
    parts: list[list[_Interval]],
    missed: Sequence[int],
    points: int,
) -> None:
    """Halve the part of each missed row's line where its sum is most at fault; changes `parts`."""
    worst = [max(parts[i], key=lambda part: abs(part.error)) for i in missed]
    middles = [(part.low + part.high) / 2 for part in worst]
    some = [rows[i] for i in missed]
    direction = path.direction[missed]
    moved = line.output(some, middles) - path.start[missed]  # (missed, numbers)
    values = (moved * direction).sum(1).tolist()
    lower = []
    upper = []
    for i, part, middle, value in zip(missed, worst, middles, values, strict=True):
        change = value - _value_at(parts[i], part.low)
        lower.append((part.low, middle, change))
        upper.append((middle, part.high, part.change - change))
    lower_parts = _integrated(line, some, lower, direction, points)
    upper_parts = _integrated(line, some, upper, direction, points)
    for i, part, *halves in zip(missed, worst, lower_parts, upper_parts, strict=True):
        parts[i].remove(part)
        parts[i] += halves


def _error(parts: Sequence[_Interval]) -> float:
    """1 - the sum of a row's shares."""
    return sum(part.error for part in parts)


def _value_at(parts: Sequence[_Interval], alpha: float) -> float:
    """What is explained at one of the ends of a row's parts."""
    return sum(part.change for part in parts if part.high <= alpha)


def _integrated(
    line: Line,
    rows: Sequence[int],
    ends: Sequence[tuple[float, float, float]],
    direction: Tensor,
    points: int,
) -> list[_Interval]:
    """The shares over one part of each row's line. `ends`: (low, high, change) of each."""
    # Gauss and Legendre's points: exact for polynomials up to degree 2 points - 1, and none of
    # them is an end, where a token that one of the texts does not have has no derivative.
    nodes, weights = np.polynomial.legendre.leggauss(points)
    layers: list[Any] = [0.0] * len(rows)
    pooled: list[Any] = [0.0] * len(rows)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        alphas = [low + (high - low) * float(node) for low, high, _ in ends]
        shares = line.shares(rows, alphas, direction)
        for i, (low, high, _) in enumerate(ends):
            layers[i] = layers[i] + weight * (high - low) * shares.layers[i]
            pooled[i] = pooled[i] + weight * (high - low) * shares.pooled[i]
    return [_Interval(*ends[i], layers[i], pooled[i]) for i in range(len(rows))]


def gradients_along(
    output: Tensor, leaves: Sequence[Tensor], direction: Tensor, *, is_half: bool = False
) -> list[Tensor]:
    """The gradient of ⟨output, direction⟩ by each leaf, in float32; rows do not mix.

    Args:
        output: (rows, ...)
        leaves: Tensors with a row for each of `output`.
        direction: (rows, numbers of a row)
        is_half: Whether numbers of sixteen bits lie on the way, though `output` may have more.

    Raises:
        LocogenError: A leaf was not used, or gradients are not finite.
    """
    import torch

    flat = output.flatten(1)
    if output.itemsize >= 4 and not is_half:
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
