"""The solvers' theorems, each on random matrices, and each with a twin that shows the test can fail."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from locogen.editing import closed_form
from locogen.errors import LocogenError

OUT, IN = 7, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(seed: int, rows: int, kept: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, source, target, preserved rows."""
    parts = normal(OUT + 2 * rows + kept, IN, seed=seed)
    w, s, t, p = parts.split([OUT, rows, rows, kept])
    return w, s, t, p


def objective(
    delta: Tensor,
    w: Tensor,
    s: Tensor,
    t: Tensor,
    ridge: float,
    p: Tensor,
    weight: float,
    c: Tensor,
) -> Tensor:
    """What the published papers minimize, written as they write it."""
    missed = (s @ (w + delta).T - t @ w.T).square().sum()
    moved = (p @ (w + delta).T - p @ w.T).square().sum()
    return missed + weight * moved + ridge * (delta @ c @ delta.T).trace()


seeds = st.integers(0, 10_000)
counts = st.integers(1, 9)
ridges = st.floats(1e-3, 1e3)


@given(seeds, counts, st.integers(0, 9), ridges, st.floats(0, 10), st.booleans())
def test_gradient_vanishes_at_the_answer_only(
    seed: int, rows: int, kept: int, ridge: float, weight: float, learned: bool
) -> None:
    w, s, t, p = case(seed, rows, kept)
    c = (
        closed_form.Covariance(IN).add(normal(40, IN, seed=seed + 1)).matrix()
        if learned
        else torch.eye(IN).double()
    )
    found = closed_form.ridge_update(
        w, s, t, ridge=ridge, preserve=p, preserve_weight=weight, covariance=c if learned else None
    )

    def slope(delta: Tensor) -> float:
        delta = delta.clone().requires_grad_()
        objective(delta, w, s, t, ridge, p, weight, c).backward()
        return float(delta.grad.norm())  # pyright: ignore

    before = slope(torch.zeros_like(w))
    assert before > 1e-3
    assert slope(found.change) < 1e-9 * before * (1 + 1 / ridge)


@given(seeds, counts, ridges)
def test_rank_and_what_is_not_touched(seed: int, rows: int, ridge: float) -> None:
    w, s, t, _ = case(seed, rows)
    change = closed_form.ridge_update(w, s, t, ridge=ridge).change
    assert torch.linalg.matrix_rank(change) <= rows
    stranger = normal(1, IN, seed=seed + 2)
    q = torch.linalg.qr(s.T)[0]
    apart = stranger - stranger @ q @ q.T
    assert (apart @ change.T).norm() < 1e-10 * (1 + change.norm())
    assert (stranger @ change.T).norm() > 1e-8  # a row that is not orthogonal moves


@given(seeds, counts, ridges, st.integers(0, 6))
def test_equals_the_published_d_by_d_form(seed: int, rows: int, ridge: float, kept: int) -> None:
    """UCE's closed form as written, in float64; without preserved rows it is TIME's and LocoEdit's."""
    w, s, t, p = case(seed, rows, kept)
    left = ridge * w + (w @ t.T) @ s + (w @ p.T) @ p
    right = ridge * torch.eye(IN).double() + s.T @ s + p.T @ p
    published = left @ torch.linalg.inv(right)
    found = w + closed_form.ridge_update(w, s, t, ridge=ridge, preserve=p).change
    assert torch.allclose(found, published, rtol=0, atol=1e-8 * (1 + 1 / ridge))
    assert not torch.allclose(w, published, rtol=0, atol=1e-8 * (1 + 1 / ridge))


def test_float32_inverse_of_the_published_form_is_far_off_for_near_parallel_rows() -> None:
    w = normal(32, 768)
    s = normal(1, 768, seed=1) * 27 + 0.05 * normal(4, 768, seed=2)
    t = s + normal(4, 768, seed=3)
    exact = closed_form.ridge_update(w, s, t, ridge=0.01).change
    a = 0.01 * torch.eye(768) + (s.T @ s).float()
    lossy = (0.01 * w + (w @ t.T) @ s).float() @ torch.linalg.inv(a) - w.float()
    assert (lossy.double() - exact).norm() > 0.01 * exact.norm()
    a = 0.01 * torch.eye(768).double() + s.T @ s
    plain = (0.01 * w + (w @ t.T) @ s) @ torch.linalg.inv(a) - w
    assert (plain - exact).norm() < 1e-6 * exact.norm()


@given(seeds, st.integers(1, 5))
def test_limits_of_the_ridge(seed: int, rows: int) -> None:
    w, s, t, _ = case(seed, rows)
    nothing = closed_form.ridge_update(w, s, t, ridge=1e14).change
    assert nothing.norm() < 1e-9
    everything = w + closed_form.ridge_update(w, s, t, ridge=1e-11).change
    assert torch.allclose(s @ everything.T, t @ w.T, atol=1e-6)
    half = w + closed_form.ridge_update(w, s, t, ridge=10.0).change
    assert not torch.allclose(s @ half.T, t @ w.T, atol=1e-6)


@given(seeds, st.integers(2, 9), st.integers(0, 5))
def test_order_of_rows_does_not_matter(seed: int, rows: int, kept: int) -> None:
    w, s, t, p = case(seed, rows, kept)
    turn = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    one = closed_form.ridge_update(w, s, t, ridge=0.1, preserve=p).change
    two = closed_form.ridge_update(w, s[turn], t[turn], ridge=0.1, preserve=p.flip(0)).change
    assert torch.allclose(one, two, atol=1e-9)
    if not torch.equal(turn, torch.arange(rows)):
        mixed = closed_form.ridge_update(w, s[turn], t, ridge=0.1, preserve=p).change
        assert not torch.allclose(one, mixed, atol=1e-9)


@given(seeds, counts)
def test_no_op_stays_a_no_op(seed: int, rows: int) -> None:
    w, s, t, p = case(seed, rows, 3)
    assert closed_form.ridge_update(w, s, s, ridge=0.1, preserve=p).change.abs().max() == 0
    assert closed_form.ridge_update(w, s, t, ridge=0.1, preserve=p).change.abs().max() > 0


@given(seeds, st.integers(1, 4), ridges)
def test_both_forms_agree(seed: int, rows: int, ridge: float) -> None:
    """Fewer rows than columns: n x n; the same rows many times over: d x d. Repeating k times divides ridge by k."""
    w, s, t, _ = case(seed, rows)
    small = closed_form.ridge_update(w, s, t, ridge=ridge).change
    times = 1 + IN // rows
    large = closed_form.ridge_update(
        w, s.repeat(times, 1), t.repeat(times, 1), ridge=ridge * times
    ).change
    assert torch.allclose(small, large, atol=1e-8 * (1 + 1 / ridge))


@given(seeds, st.integers(1, 3), st.integers(1, 6), ridges)
def test_null_space_moves_no_preserved_row(seed: int, rows: int, kept: int, ridge: float) -> None:
    w, s, t, p = case(seed, rows, kept)
    down = closed_form.null_space_factor(s, p, ridge=ridge)
    change = closed_form.update(w, s, t, down).change
    assert (p @ change.T).abs().max() < 1e-12 * (1 + change.norm())
    assert (
        p @ closed_form.ridge_update(w, s, t, ridge=ridge, preserve=p).change.T
    ).abs().max() > 1e-9
    q = torch.linalg.qr(p.T)[0]
    hidden = torch.eye(IN).double() - q @ q.T
    free = (
        torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)).double() @ hidden
    ) * 1e-3

    def cost(delta: Tensor) -> float:
        return float(objective(delta, w, s, t, ridge, p[:0], 0.0, torch.eye(IN).double()))

    assert cost(change) <= min(
        cost(change + free), cost(change - free)
    )  # the best of those that move none


@pytest.mark.parametrize(
    ("out", "width", "rows"), [(7, 12, 8), (12, 7, 8), (300, 5, 40), (5, 12, 12)]
)
def test_many_rows_are_kept_as_the_change_itself(out: int, width: int, rows: int) -> None:
    w, s, t = normal(out, width), normal(rows, width, seed=1), normal(rows, width, seed=2)
    found = closed_form.ridge_update(w, s, t, ridge=0.1)
    plain = w @ (t - s).T @ closed_form.shared_factor(s, ridge=0.1)
    assert torch.allclose(found.change, plain, atol=1e-9)
    assert found.rank == min(out, width) < rows
    assert closed_form.ridge_update(w, s[:2], t[:2], ridge=0.1).rank == 2


def test_several_matrices_at_once_are_the_same_changes() -> None:
    s, t = normal(8, IN, seed=1), normal(8, IN, seed=2)
    down, weights = (
        closed_form.shared_factor(s, ridge=0.1),
        [normal(out, IN, seed=out) for out in (5, 9)],
    )
    found = closed_form.updates(weights, s, t, down)
    assert [c.rank for c in found] == [5, 8]  # more rows than the first matrix is high
    for w, change in zip(weights, found, strict=True):
        assert torch.allclose(change.change, w @ (t - s).T @ down, atol=1e-9)


def test_null_space_refuses_a_source_that_is_preserved() -> None:
    s = normal(2, IN)
    with pytest.raises(LocogenError, match="span a source"):
        closed_form.null_space_factor(s, torch.cat([s[:1], normal(2, IN, seed=1)]), ridge=0.1)


def output_objective(
    a: Tensor, w: Tensor, s: Tensor, t: Tensor, ridge: float, p: Tensor, weight: float
) -> Tensor:
    """What `output_update` minimizes, as its docstring writes it."""
    beyond = (s - t) @ w.T  # (rows, out)
    kept = torch.cat([t, p]) @ w.T  # (rows, out)
    size = beyond.square().sum() / OUT  # the mean of the diagonal of D
    missed = (beyond - beyond @ a.T).square().sum()
    return missed + weight * (kept @ a.T).square().sum() + ridge * size * a.square().sum()


@given(seeds, counts, st.floats(1e-3, 10), st.floats(0, 10))
def test_the_output_update_is_the_minimum(
    seed: int, rows: int, ridge: float, weight: float
) -> None:
    w, s, t, p = case(seed, rows, kept=2)
    found = closed_form.output_update(w, s, t, ridge=ridge, preserve=p, preserve_weight=weight)
    assert found.rank <= max(rows, OUT)
    a = torch.linalg.lstsq(w.T, -found.change.T).solution.T  # (out, out), of change = -A w
    assert torch.allclose(-a @ w, found.change, atol=1e-8)
    least = output_objective(a, w, s, t, ridge, p, weight)
    for other in range(3):
        moved = a + 0.01 * normal(OUT, OUT, seed=other)
        assert output_objective(moved, w, s, t, ridge, p, weight) > least


@given(seeds)
def test_no_state_gets_back_what_was_taken_out_of_every_answer(seed: int) -> None:
    """The twin: an edit of what is read leaves it to other states."""
    w, s, t, _ = case(seed, 2)
    beyond = (s - t) @ w.T  # (rows, out)
    outputs = closed_form.output_update(w, s, t, ridge=1e-9, preserve_weight=0.0)
    inputs = closed_form.ridge_update(w, s, t, ridge=1e-9)
    assert (beyond @ (w + outputs.change)).norm() < 1e-6 * (beyond @ w).norm()
    assert (beyond @ (w + inputs.change)).norm() > 1e-3 * (beyond @ w).norm()


def test_what_is_preserved_keeps_its_output_the_more_it_counts() -> None:
    w, s, t, p = case(0, 3, kept=2)
    moved = []
    for weight in (0.0, 1.0, 1e6):
        change = closed_form.output_update(
            w, s, t, ridge=0.01, preserve=p, preserve_weight=weight
        ).change
        moved.append(float((p @ change.T).norm()))
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-3 * moved[0]


def test_where_nothing_is_said_beyond_the_targets_nothing_is_taken_out() -> None:
    w, s, _, _ = case(0, 2)
    assert not closed_form.output_update(w, s, s, ridge=0.1).change.any()


@given(seeds, counts)
def test_balanced_factors_are_the_same_change_and_round_better(seed: int, rows: int) -> None:
    w, s, t, _ = case(seed, rows)
    found = closed_form.ridge_update(w, s * 30, t * 30, ridge=0.01)
    even = found.balanced()
    assert torch.allclose(even.change, found.change, atol=1e-9 * (1 + found.change.norm()))
    assert torch.allclose(even.up.norm(), even.down.norm())
    assert even.rank <= min(rows, OUT)


def test_balanced_of_nothing_is_nothing() -> None:
    even = closed_form.LowRank(torch.zeros(3, 2).double(), torch.ones(2, 4).double()).balanced()
    assert even.change.abs().max() == 0
    assert even.rank == 1


def test_covariance_streams() -> None:
    rows = normal(30, IN)
    whole = closed_form.Covariance(IN).add(rows).matrix(0.0)
    parts = closed_form.Covariance(IN).add(rows[:7]).add(rows[7:]).matrix(0.0)
    assert torch.allclose(whole, parts)
    assert torch.allclose(whole, rows.T @ rows / 30)
    with pytest.raises(LocogenError, match="no rows yet"):
        closed_form.Covariance(IN).matrix()


def test_total_is_the_sum() -> None:
    w, s, t, _ = case(0, 4)
    one, two = (
        closed_form.ridge_update(w, s[k], t[k], ridge=0.1) for k in (slice(0, 2), slice(2, 4))
    )
    assert torch.allclose(closed_form.total([one, two]).change, one.change + two.change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(ridge=0.0), "ridge is 0.0"),
        (dict(ridge=-1.0), "ridge is -1.0"),
        (dict(ridge=float("nan")), "ridge is nan"),
        (dict(preserve=normal(1, IN), preserve_weight=-1.0), "preserve_weight"),
        (dict(weight=torch.full((OUT, IN), torch.nan)), "weight has non-finite"),
        (dict(source=torch.full((2, IN), torch.inf)), "source has non-finite"),
        (dict(weight=normal(OUT, IN - 1)), "do not fit"),
        (dict(weight=torch.ones(OUT, IN, dtype=torch.int8)), "floating-point"),
        (dict(covariance=torch.zeros(IN, IN)), "no unique solution"),
    ],
)
def test_bad_input(change: dict, says: str) -> None:
    w, s, t, _ = case(0, 2)
    given = dict(weight=w, source=s, target=t, ridge=0.1) | change
    with pytest.raises(LocogenError, match=says):
        closed_form.ridge_update(**given)
