"""Closed-form edits of linear maps as low-rank factors: tensors in, tensors out, all in float64.

A map reads row vectors: `y = x @ weight.T`, weight (out, in). Every solver here answers "which change of the weight
sends `source[i]` where the old weight sends `target[i]`, and changes little else?". The answer is always

    change = weight @ (target - source).T @ down,   down (n, in), n the number of source rows,

so its rank is at most n, and `down` is the same for every matrix that reads the same rows: solve once, apply to keys
and values of every layer. With unregularized parts (the d x d form of the published scripts) float32 loses 22 % to 83 %
of the answer for near-parallel rows; the n x n system in float64 does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locogen.errors import LocogenError


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a weight (out, in) as `up @ down`: up (out, rank), down (rank, in)."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of `up`, an upper bound of the change's rank."""
        return self.up.shape[1]

    @property
    def change(self) -> Tensor:
        """The change itself, (out, in)."""
        return self.up @ self.down

    def balanced(self) -> LowRank:
        """The same change with both factors equally large and its rank as small as it is, for rounding.

        Thin QR of each factor, then the SVD of the small core: singular values split evenly between the factors.
        Directions below the rounding of float64 are dropped.
        """
        left, core_left = torch.linalg.qr(self.up)
        right, core_right = torch.linalg.qr(self.down.T)
        u, sizes, v = torch.linalg.svd(core_left @ core_right.T)
        count = min(u.shape[1], v.shape[0])
        kept = (
            int((sizes > sizes.max() * torch.finfo(sizes.dtype).eps * count).sum())
            if len(sizes)
            else 0
        )
        kept = max(kept, 1)
        half = sizes[:kept].sqrt()
        return LowRank(left @ u[:, :kept] * half, (half[:, None] * v[:kept]) @ right.T)


class Covariance:
    """The second moment of text states, gathered streaming: `add` rows (n, width), then `matrix()`.

    MEMIT (arXiv 2210.07229): C = E[k kᵀ] over ordinary prompts.
    """

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64)
        self.count = 0

    def add(self, rows: Tensor) -> Covariance:
        """Take more rows in, (n, width); returns itself."""
        rows = _rows(rows, "rows").cpu()
        self.total += rows.T @ rows
        self.count += len(rows)
        return self

    def matrix(self, shrinkage: float = 1e-3) -> Tensor:
        """The mean outer product, (width, width), drawn toward a multiple of the identity so that it has an inverse.

        Raises `LocogenError` where no row was added.
        """
        if not self.count:
            raise LocogenError(
                "the covariance has no rows yet: add the text states of some ordinary prompts"
            )
        mean = self.total / self.count
        even = torch.eye(len(mean), dtype=torch.float64) * mean.trace() / len(mean)
        return (1 - shrinkage) * mean + shrinkage * even


def reader(
    source: Tensor,
    *,
    ridge: float,
    preserve: Tensor | None = None,
    preserve_weight: float = 1.0,
    covariance: Tensor | None = None,
) -> Tensor:
    """The factor `down`, (n, in), that all matrices reading `source`, (n, in), share.

    It minimizes, over changes Δ of a weight Ŵ, for targets t and sources s,

        Σ ‖Δ s - Ŵ (t - s)‖² + preserve_weight Σ ‖Δ p‖² + ridge tr(Δ C Δᵀ)

    with C the identity (LocoEdit, arXiv 2405.01008; TIME, arXiv 2303.08084), plus the rows p of `preserve`, (m, in),
    (UCE, arXiv 2308.14761), or with C a covariance (MEMIT, arXiv 2210.07229: R Kᵀ (λ C + K Kᵀ)⁻¹).
    Solved as (n + m) x (n + m) or as d x d, whichever is smaller; with a covariance, as d x d.
    Raises `LocogenError` for ridge <= 0, a negative weight, non-finite values, and a covariance without inverse.
    """
    s = _rows(source, "source")
    if not ridge > 0:
        raise LocogenError(f"ridge is {ridge}: give it a number above 0 (0.01 is the paper's)")
    if preserve_weight < 0:
        raise LocogenError(f"preserve_weight is {preserve_weight}: give it a number from 0 up")
    if preserve is not None and preserve_weight > 0 and len(preserve):
        kept = _rows(preserve, "preserve") * preserve_weight**0.5
    else:
        kept = s[:0]
    every = torch.cat([s, kept])
    if covariance is None and len(every) <= s.shape[1]:
        gram = every @ every.T + ridge * torch.eye(len(every), dtype=s.dtype, device=s.device)
        return _solve(gram, every)[: len(s)]  # (S Sᵀ + λ I)⁻¹ S, rows of the sources
    penalty = (
        torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
        if covariance is None
        else covariance.to(s)
    )
    return _solve(every.T @ every + ridge * penalty, s.T).T  # S (SᵀS + λ C)⁻¹


def null_space_reader(source: Tensor, preserve: Tensor, *, ridge: float) -> Tensor:
    """`reader` under the constraint that the rows of `preserve`, (m, in), stay exactly where they were.

    The sources are read only where no preserved row reaches: s (I - Q Qᵀ), Q an orthonormal basis of the preserved
    rows (as AlphaEdit does, arXiv 2410.02355). Raises `LocogenError` as `reader`, and where the preserved rows leave
    nothing of a source to be read.
    """
    s, kept = _rows(source, "source"), _rows(preserve, "preserve")
    _, sizes, basis = torch.linalg.svd(kept, full_matrices=False)
    basis = (
        basis[sizes > sizes.max() * max(kept.shape) * torch.finfo(kept.dtype).eps]
        if len(kept)
        else basis
    )
    free = s
    for _ in range(2):  # twice is enough: what rounding leaves of the preserved rows goes too
        free = free - (free @ basis.T) @ basis
    if (free.norm(dim=1) < 1e-9 * s.norm(dim=1)).any():
        raise LocogenError(
            "the preserved rows span a source: nothing could change. Preserve fewer prompts"
        )
    down = reader(free, ridge=ridge)
    return down - (down @ basis.T) @ basis


def ridge_update(
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    ridge: float,
    preserve: Tensor | None = None,
    preserve_weight: float = 1.0,
    covariance: Tensor | None = None,
) -> LowRank:
    """The change of `weight`, (out, in), that sends `source`, (n, in), where `target`, (n, in), goes (see `reader`).

    LocoEdit's closed form (Basu et al. 2024) exactly, in float64, as factors of rank n. Raises
    `LocogenError` as `reader`, and for shapes that do not fit.
    """
    down = reader(
        source,
        ridge=ridge,
        preserve=preserve,
        preserve_weight=preserve_weight,
        covariance=covariance,
    )
    return update(weight, source, target, down)


def update(weight: Tensor, source: Tensor, target: Tensor, down: Tensor) -> LowRank:
    """The change of one matrix with the factor `down` of `reader`: up = Ŵ (T - S)ᵀ, (out, n). See `updates`."""
    return updates([weight], source, target, down)[0]


def updates(
    weights: Sequence[Tensor], source: Tensor, target: Tensor, down: Tensor
) -> list[LowRank]:
    """The changes of several matrices that read the same rows: what they share is computed once.

    With more rows than a matrix is high or wide, its change is smaller than the factors, and stands beside an
    identity in their place: Ŵ P with P = (T - S)ᵀ down, (in, in).
    """
    s, t = _rows(source, "source"), _rows(target, "target")
    for weight in weights:
        _check_matrix(weight, "weight")
        if s.shape != t.shape or s.shape[1] != weight.shape[1]:
            shapes = ", ".join(str(tuple(part.shape)) for part in (s, t, weight))
            raise LocogenError(f"source, target and weight of shapes {shapes} do not fit")
    step = (t - s).T  # (in, n)
    crowded = [len(s) > min(weight.shape) for weight in weights]
    pull = step @ down if any(crowded) else step
    return [
        _whole(_product(weight.detach(), pull))
        if many
        else LowRank(_product(weight.detach(), step), down)
        for weight, many in zip(weights, crowded, strict=True)
    ]


def _whole(change: Tensor) -> LowRank:
    one = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
    return LowRank(one, change) if len(one) == len(change) else LowRank(change, one)


def total(changes: Iterable[LowRank]) -> LowRank:
    """The sum of changes of one weight, as one pair of factors."""
    parts = list(changes)
    return LowRank(torch.cat([p.up for p in parts], 1), torch.cat([p.down for p in parts]))


def _product(weight: Tensor, right: Tensor) -> Tensor:
    """Weight @ right in float64, (out, n); for few columns cast block by block: a whole copy costs more than the rest.

    Raises `LocogenError` for non-finite weights, which leave no row of the product finite that they are in.
    """
    product = torch.empty(len(weight), right.shape[1], dtype=right.dtype, device=right.device)
    height = max(128, right.shape[1])
    for rows, part in zip(product.split(height), weight.split(height), strict=True):
        torch.mm(doubled(part).to(right.device), right, out=rows)
    _check_finite(product, "weight")
    return product


def _rows(values: Tensor, name: str) -> Tensor:
    """A matrix in float64. Raises `LocogenError` for other shapes, no rows, and non-finite values."""
    _check_matrix(values, name)
    _check_finite(values, name)
    return doubled(values.detach())


def doubled(values: Tensor) -> Tensor:
    """In float64: on CUDA where it is, else on the CPU, since Apple's MPS has no float64."""
    return (values if values.is_cuda else values.cpu()).double()


def _check_matrix(values: Tensor, name: str) -> None:
    if values.ndim != 2 or not values.is_floating_point():
        raise LocogenError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}: give a floating-point matrix"
        )


def _check_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        raise LocogenError(f"{name} has non-finite values: load the model in float32 or bfloat16")


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a positive definite system by Cholesky's factorization."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise LocogenError(
            "the system has no unique answer: raise ridge, or the covariance's shrinkage"
        )
    return torch.cholesky_solve(right, factor)
