"""Closed-form edits of linear maps as low-rank factors: tensors in, tensors out, all in float64.

A map reads row vectors: `y = x @ weight.T`, weight (out, in). Every solver here answers "which
change of the weight sends `source[i]` where the old weight sends `target[i]`, and changes little
else?". The answer is always

    change = weight @ (target - source).T @ down,   down (n, in), n the number of source rows,

so its rank is at most n, and `down` is the same for every matrix that reads the same rows: solve
once, apply to keys and values of every layer. With unregularized parts (the d x d form of the
published scripts) float32 loses 22 % to 83 % of the answer for near-parallel rows; the n x n system
in float64 does not.
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
        """The same change with factors of equal size and the smallest rank, for rounding.

        Thin QR of each factor, then the SVD of the small core. Directions below the rounding of
        float64 are dropped.
        """
        left, left_core = torch.linalg.qr(self.up)  # (out, rank), (rank, rank)
        right, right_core = torch.linalg.qr(self.down.T)  # (in, rank), (rank, rank)
        u, sizes, v = torch.linalg.svd(left_core @ right_core.T)

        rank = 1  # at least: a file holds no factor without rows
        if len(sizes):
            rounding = sizes.max() * torch.finfo(sizes.dtype).eps * len(sizes)
            rank = max(rank, int((sizes > rounding).sum()))

        # Each factor gets the square roots of the singular values, so both have the same norm.
        roots = sizes[:rank].sqrt()  # (rank,)
        up = left @ u[:, :rank] * roots  # (out, rank)
        down = (roots[:, None] * v[:rank]) @ right.T  # (rank, in)
        return LowRank(up, down)


class Covariance:
    """The second moment of text states: `add` rows (n, width) in parts, then `matrix()`.

    MEMIT (arXiv 2210.07229): C = E[k kᵀ] over ordinary prompts.
    """

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64)
        self.count = 0

    def add(self, rows: Tensor) -> Covariance:
        """Add more rows, (n, width); returns itself."""
        rows = _rows(rows, "rows").cpu()  # (n, width)
        self.total += rows.T @ rows
        self.count += len(rows)
        return self

    def matrix(self, shrinkage: float = 1e-3) -> Tensor:
        """The mean outer product, (width, width), shrunk so that it has an inverse.

        Args:
            shrinkage: Share of a multiple of the identity with the same trace, 0 to 1.

        Raises:
            LocogenError: No row was added.
        """
        if not self.count:
            raise LocogenError(
                "the covariance has no rows yet: add the text states of some ordinary prompts"
            )
        mean = self.total / self.count  # (width, width)
        even = torch.eye(len(mean), dtype=torch.float64) * mean.trace() / len(mean)
        return (1 - shrinkage) * mean + shrinkage * even


# --- the factor that all matrices share ----------------------------------------------------------


def shared_factor(
    source: Tensor,
    *,
    ridge: float,
    preserve: Tensor | None = None,
    preserve_weight: float = 1.0,
    covariance: Tensor | None = None,
) -> Tensor:
    """The factor `down`, (n, in), that all matrices reading `source` share.

    It minimizes, over changes Δ of a weight Ŵ, for targets t and sources s,

        Σ ‖Δ s - Ŵ (t - s)‖² + preserve_weight Σ ‖Δ p‖² + ridge tr(Δ C Δᵀ)

    with C the identity (LocoEdit, arXiv 2405.01008; TIME, arXiv 2303.08084), plus the rows p of
    `preserve` (UCE, arXiv 2308.14761), or with C a covariance (MEMIT, arXiv 2210.07229:
    R Kᵀ (λ C + K Kᵀ)⁻¹).

    Args:
        source: Rows that should change, (n, in).
        ridge: λ, above 0.
        preserve: Rows that should stay, (m, in); None: none.
        preserve_weight: How much a preserved row counts next to a source row, from 0 up.
        covariance: C, (in, in); None: the identity.

    Raises:
        LocogenError: A ridge or a weight out of its range, values that are not finite, or a
            covariance without inverse.
    """
    s = _rows(source, "source")  # (n, in)
    _check_strengths(ridge, preserve_weight)

    # A preserved row is a source row whose target is itself, weighted by the root of its weight.
    preserved = s[:0]  # (m, in)
    if preserve is not None and preserve_weight > 0 and len(preserve):
        preserved = _rows(preserve, "preserve") * preserve_weight**0.5
    rows = torch.cat([s, preserved])  # (n + m, in)

    # Two forms of one answer: the smaller system is solved. A covariance needs the d x d form.
    if covariance is None and len(rows) <= s.shape[1]:
        gram = rows @ rows.T  # (n + m, n + m)
        gram = gram + ridge * torch.eye(len(rows), dtype=s.dtype, device=s.device)
        return _solve(gram, rows)[: len(s)]  # (S Sᵀ + λ I)⁻¹ S, rows of the sources
    penalty = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)  # (in, in)
    if covariance is not None:
        penalty = covariance.to(s)
    return _solve(rows.T @ rows + ridge * penalty, s.T).T  # S (SᵀS + λ C)⁻¹


def null_space_factor(source: Tensor, preserve: Tensor, *, ridge: float) -> Tensor:
    """`shared_factor`, (n, in), under the constraint that preserved rows keep their output exactly.

    Of each source, the part is read that is orthogonal to all preserved rows: s (I - Q Qᵀ), with
    Q an orthonormal basis of the preserved rows (as AlphaEdit does, arXiv 2410.02355).

    Args:
        source: Rows that should change, (n, in).
        preserve: Rows that must stay, (m, in).
        ridge: λ, above 0.

    Raises:
        LocogenError: As `shared_factor`, and where nothing of a source is left.
    """
    s = _rows(source, "source")  # (n, in)
    preserved = _rows(preserve, "preserve")  # (m, in)
    _, sizes, basis = torch.linalg.svd(preserved, full_matrices=False)
    if len(preserved):
        rounding = sizes.max() * max(preserved.shape) * torch.finfo(preserved.dtype).eps
        basis = basis[sizes > rounding]  # (rank, in), Qᵀ

    free = s
    for _ in range(2):  # once more, since rounding leaves a little of the preserved rows
        free = free - (free @ basis.T) @ basis
    if (free.norm(dim=1) < 1e-9 * s.norm(dim=1)).any():
        raise LocogenError(
            "the preserved rows span a source row, so the edit cannot change anything: preserve "
            "fewer prompts"
        )
    down = shared_factor(free, ridge=ridge)
    return down - (down @ basis.T) @ basis


# --- what would undo it --------------------------------------------------------------------------


def returning_map(old: Sequence[Tensor], new: Sequence[Tensor], *, ridge: float) -> Tensor:
    """Which change of a state makes edited matrices say of it what the old ones said.

    It is RECE's equation (Gong et al. 2024, arXiv 2407.12383) with the change, not the state
    itself, kept small, so that without an edit nothing changes: over d, for a state c, minimize

        Σ ‖W' (c + d) - W c‖² + λ ‖d‖²,   d = (λ I + Σ W'ᵀ W')⁻¹ Σ W'ᵀ (W - W') c

    with λ = ridge times the mean of the diagonal of Σ W'ᵀ W'.

    Args:
        old: The matrices W before the edit, (out, width) each.
        new: The matrices W' after it, in the same order.
        ridge: How much the state is held, above 0.

    Returns:
        The matrix D of d = D c, (width, width).
    """
    first = to_float64(new[0])
    width = first.shape[1]
    moment = torch.zeros(width, width, dtype=first.dtype, device=first.device)
    pull = torch.zeros_like(moment)  # (width, width)
    for before, behind in zip(old, new, strict=True):
        edited = to_float64(behind).to(moment)  # (out, width)
        moment += edited.T @ edited
        if before is not behind:  # a matrix that no edit changes pulls nowhere
            pull += edited.T @ (to_float64(before).to(moment) - edited)
    held = ridge * moment.trace() / width * torch.eye(width).to(moment)
    return torch.linalg.solve(moment + held, pull)  # (width, width)


# --- the change of each matrix -------------------------------------------------------------------


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
    """The change of one weight that sends the source rows where the target rows go.

    LocoEdit's closed form (Basu et al. 2024) exactly, in float64, as factors of rank n.

    Args:
        weight: Ŵ, (out, in).
        source: Rows that should change, (n, in).
        target: For each the row whose output it should get, (n, in).
        ridge: As in `shared_factor`, like the others.
        preserve: Rows that should stay, (m, in).
        preserve_weight: How much they count.
        covariance: C, (in, in).

    Raises:
        LocogenError: As `shared_factor`, and for shapes that do not fit.
    """
    down = shared_factor(
        source,
        ridge=ridge,
        preserve=preserve,
        preserve_weight=preserve_weight,
        covariance=covariance,
    )
    return update(weight, source, target, down)


def update(weight: Tensor, source: Tensor, target: Tensor, down: Tensor) -> LowRank:
    """The change of one matrix, `down` from `shared_factor`: up = Ŵ (T - S)ᵀ, (out, n)."""
    return updates([weight], source, target, down)[0]


def updates(
    weights: Sequence[Tensor], source: Tensor, target: Tensor, down: Tensor
) -> list[LowRank]:
    """The changes of several matrices that read the same rows: what they share is computed once.

    Args:
        weights: Matrices, (out, in) each.
        source: Rows that should change, (n, in).
        target: For each the row whose output it should get, (n, in).
        down: The factor from `shared_factor`, (n, in).

    Raises:
        LocogenError: Shapes that do not fit, or values that are not finite.
    """
    s = _rows(source, "source")  # (n, in)
    t = _rows(target, "target")  # (n, in)
    for weight in weights:
        _check_shapes(weight, s, t)

    step = (t - s).T  # (in, n)
    whole_step: Tensor | None = None  # (in, in), computed once for all that need it
    changes: list[LowRank] = []
    for weight in weights:
        if len(s) <= min(weight.shape):
            changes.append(LowRank(_product(weight.detach(), step), down))
            continue
        # More rows than the matrix is high or wide: the change is smaller than its factors.
        if whole_step is None:
            whole_step = step @ down
        changes.append(_with_identity(_product(weight.detach(), whole_step)))
    return changes


def output_update(
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    ridge: float,
    preserve: Tensor | None = None,
    preserve_weight: float = 1.0,
) -> LowRank:
    """The change of one weight after which no input gets an answer along the concept's directions.

    Where `ridge_update` sends some inputs elsewhere, this takes directions out of every output, as
    weights are orthogonalized in language models (Arditi et al. 2024, arXiv 2406.11717): the new
    weight is (I - A) Ŵ. With d = Ŵ (s - t), what the weight says of a source beyond its target, and
    q what it says of targets and preserved rows, A minimizes

        Σ ‖(I - A) d‖² + preserve_weight Σ ‖A q‖² + λ ‖A‖²,   A = D (D + preserve_weight Q + λ I)⁻¹

    with D = Σ d dᵀ, Q = Σ q qᵀ, and λ = ridge times the mean of the diagonal of D.

    Args:
        weight: Ŵ, (out, in).
        source: Rows that the concept has, (n, in).
        target: For each the row whose output it should get, (n, in); their outputs should stay.
        ridge: How little is taken out, as a share of the concept's own size, above 0.
        preserve: Rows whose outputs should stay as well, (m, in); None: none.
        preserve_weight: How much a target or preserved row counts next to a source row.

    Raises:
        LocogenError: As `shared_factor`, and for shapes that do not fit.
    """
    s = _rows(source, "source")  # (n, in)
    t = _rows(target, "target")  # (n, in)
    _check_shapes(weight, s, t)
    _check_strengths(ridge, preserve_weight)
    stays = t  # (n + m, in)
    if preserve is not None:
        stays = torch.cat([t, _rows(preserve, "preserve").to(t)])
    beyond = _product(weight.detach(), (s - t).T).T  # d, (n, out)
    preserved = _product(weight.detach(), stays.T).T  # q, (n + m, out)
    concept = beyond.T @ beyond  # D, (out, out)
    size = concept.trace() / len(concept)
    if not size > 0:  # nothing is said beyond the targets: nothing to take out
        return LowRank(torch.zeros_like(beyond.T), torch.zeros_like(s))
    even = ridge * size * torch.eye(len(concept)).to(concept)
    whole = concept + preserve_weight * (preserved.T @ preserved) + even  # (out, out)
    taken = _solve(whole, beyond.T).T  # d (D + w Q + λ I)⁻¹, (n, out)
    down = _product(weight.detach().T, taken.T).T  # (n, in)
    if len(s) <= min(weight.shape):
        return LowRank(-beyond.T, down)
    return _with_identity(-beyond.T @ down)


def _with_identity(change: Tensor) -> LowRank:
    """A whole change, (out, in), as factors of which one is the identity."""
    identity = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
    if len(identity) == len(change):
        return LowRank(identity, change)
    return LowRank(change, identity)


def total(changes: Iterable[LowRank]) -> LowRank:
    """The sum of changes of one weight, as one pair of factors."""
    parts = list(changes)
    up = torch.cat([part.up for part in parts], 1)  # (out, sum of ranks)
    down = torch.cat([part.down for part in parts])  # (sum of ranks, in)
    return LowRank(up, down)


def _product(weight: Tensor, right: Tensor) -> Tensor:
    """Weight @ right in float64, (out, n).

    Raises `LocogenError` for a weight that is not finite: each such value spoils its whole row.
    """
    product = torch.empty(len(weight), right.shape[1], dtype=right.dtype, device=right.device)
    # Cast block by block: a copy of the whole weight in float64 costs more than the rest.
    height = max(128, right.shape[1])
    for block, part in zip(product.split(height), weight.split(height), strict=True):
        torch.mm(to_float64(part).to(right.device), right, out=block)
    _check_finite(product, "weight")
    return product


def to_float64(values: Tensor) -> Tensor:
    """The values in float64; off CUDA on the CPU, because Apple's MPS has no float64."""
    if values.is_cuda:
        return values.double()
    return values.cpu().double()


def _rows(values: Tensor, name: str) -> Tensor:
    """A matrix of rows in float64, refused unless it is a finite floating-point matrix."""
    _check_matrix(values, name)
    _check_finite(values, name)
    return to_float64(values.detach())


def _check_matrix(values: Tensor, name: str) -> None:
    if values.ndim != 2 or not values.is_floating_point():
        raise LocogenError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}: give a floating-point matrix"
        )


def _check_shapes(weight: Tensor, source: Tensor, target: Tensor) -> None:
    _check_matrix(weight, "weight")
    if source.shape != target.shape or source.shape[1] != weight.shape[1]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (source, target, weight))
        raise LocogenError(
            f"source, target and weight have shapes {shapes}, which do not fit: give source and "
            "target one shape, with a column for each input of the weight"
        )


def _check_strengths(ridge: float, preserve_weight: float) -> None:
    if not ridge > 0:  # so that NaN is refused too
        raise LocogenError(f"ridge is {ridge}: give a number above 0 (the paper uses 0.01)")
    if preserve_weight < 0:
        raise LocogenError(f"preserve_weight is {preserve_weight}: give a number of 0 or more")


def _check_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        raise LocogenError(f"{name} has non-finite values: load the model in float32 or bfloat16")


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a positive definite system by Cholesky's factorization."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise LocogenError(
            "the system has no unique solution: raise ridge, or the covariance's shrinkage"
        )
    return torch.cholesky_solve(right, factor)
