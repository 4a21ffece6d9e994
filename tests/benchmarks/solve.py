"""How fast and how exact the closed-form edit is, against the published procedure: `python tests/benchmarks/solve.py`.

Both solve the same random problem in one run: the key and value matrices of Stable Diffusion 1.5's layers 8-9 and of
SD-XL's layers 45-48 at their real shapes, and four nearly parallel source states, as those of four phrasings are. The
published procedure (LocoEdit's, TIME's and UCE's scripts) works matrix by matrix in float32:
(λ W + Σ W v cᵀ) (λ I + Σ c cᵀ)⁻¹. Errors are those of the change, relative to a float64 reference that is itself
solved with d x d. Ours is timed twice: the factors that an `Edit` is made of, and with new float32 weights as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from locogen.editing import closed_form

RIDGE = 0.01
SHAPES = {  # (out, in) of the matrices edited, keys and values of each layer
    "SD 1.5, layers 8-9": [(1280, 768)] * 4,
    "SD-XL, layers 45-48": [(1280, 2048)] * 8,
}


def problem(
    shapes: Sequence[tuple[int, int]], rows: int, concepts: int = 1
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Weights of a trained layer's size, sources that differ by 2 % within a concept, targets; float32."""
    noise = torch.Generator().manual_seed(0)
    width = shapes[0][1]
    weights = [torch.randn(shape, generator=noise) * width**-0.5 for shape in shapes]
    centers = torch.randn(concepts, 1, width, generator=noise)
    source = (centers + 0.02 * torch.randn(concepts, rows, width, generator=noise)).flatten(0, 1)
    return weights, source, torch.randn(1, width, generator=noise) + 0.1 * source


def published(weight: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """New weights as the scripts make them, for one matrix."""
    left = RIDGE * weight
    right = RIDGE * torch.eye(weight.shape[1])
    for c, v in zip(source, target, strict=True):
        left = left + (weight @ v)[:, None] @ c[None]
        right = right + c[:, None] @ c[None]
    return left @ torch.inverse(right)


def ours(weights: Sequence[Tensor], source: Tensor, target: Tensor) -> list[closed_form.LowRank]:
    return closed_form.updates(
        weights, source, target, closed_form.shared_factor(source, ridge=RIDGE)
    )


def added(weight: Tensor, change: closed_form.LowRank) -> Tensor:
    """New weights in float32."""
    return torch.addmm(weight, change.up.float(), change.down.float())


def reference(weight: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The change in float64 from the d x d system, W (T - S)ᵀ S (λ I + Sᵀ S)⁻¹, with one step of refinement."""
    w, s, t = weight.double(), source.double(), target.double()
    system = RIDGE * torch.eye(w.shape[1]).double() + s.T @ s
    right = ((w @ (t - s).T) @ s).T
    found = torch.linalg.solve(system, right)
    return (found + torch.linalg.solve(system, right - system @ found)).T


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    answer = job()
    return time.perf_counter() - begin, answer


def error(change: Tensor, exact: Tensor) -> float:
    return float((change.double() - exact).norm() / exact.norm())


def compare(name: str, rounds: int) -> None:
    """One line of the table: medians over rounds, the two in turn, so that both meet the same company."""
    weights, source, target = problem(SHAPES[name], 4)
    exact = [reference(w, source, target) for w in weights[:2]]
    ours(weights, source, target)
    times: list[tuple[float, float, float]] = []
    theirs: list[Tensor] = []
    found: list[closed_form.LowRank] = []
    for _ in range(rounds):
        slow, theirs = timed(lambda: [published(w, source, target) for w in weights])
        fast, found = timed(lambda: ours(weights, source, target))
        dense, _ = timed(lambda own=found: [added(w, c) for w, c in zip(weights, own, strict=True)])
        times.append((slow, fast, fast + dense))
    slow, fast, dense = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [statistics.median(row[0] / row[place] for row in times) for place in (1, 2)]
    off = max(error(new - w, e) for new, w, e in zip(theirs, weights, exact, strict=False))
    own = max(error(c.change, e) for c, e in zip(found, exact, strict=False))
    print(
        f"{name:20} {len(weights)} matrices | published {slow * 1e3:8.1f} ms, error {off:.1e} | factors "
        f"{fast * 1e3:6.1f} ms, {ratios[0]:4.0f} x, error {own:.1e} | new weights {dense * 1e3:6.1f} ms, "
        f"{ratios[1]:4.0f} x"
    )


def many(concepts: int) -> None:
    """Concepts solved jointly at SD-XL's shapes, four phrasings each."""
    weights, source, target = problem(SHAPES["SD-XL, layers 45-48"], 4, concepts)
    seconds, found = timed(lambda: ours(weights, source, target))
    own = error(found[0].change, reference(weights[0], source, target))
    print(
        f"{concepts:5} concepts jointly, {len(source)} rows: {seconds:6.2f} s, rank {found[0].rank}, error {own:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores{load}; λ = {RIDGE}"
    )
    for name in SHAPES:
        compare(name, rounds)
    for concepts in (1, 10, 100, 1000):
        many(concepts)


if __name__ == "__main__":
    main()
