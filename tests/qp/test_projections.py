"""Projections: against solve_qp and cvxpy, and their derivatives in every mode and to third order."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch
from contracts import assert_close, compiles, cubed, wanting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers.errors import ProblemError
from difflayers.qp import solve_qp
from difflayers.qp.projections import (
    entmax,
    project_affine,
    project_box,
    project_halfspace,
    project_l1_ball,
    project_l2_ball,
    project_psd,
    project_second_order_cone,
    project_simplex,
    sparsemax,
)

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Case:
    """A projection, sizes of its arguments for a batch of 3, and whether they are positive."""

    name: str
    fn: Any
    shapes: tuple[tuple[int, ...], ...]
    positive: tuple[int, ...] = ()
    event: int = 1
    compiles: bool = True

    def params(self, seed=0):
        rng = torch.Generator().manual_seed(seed)
        draws = [torch.randn(3, *shape, generator=rng) for shape in self.shapes]
        return tuple(0.3 + d.abs() if i in self.positive else 1.5 * d for i, d in enumerate(draws))

    def __str__(self):
        return self.name


def between(x, lower, width):
    return project_box(x, lower, lower + width)


CASES = [
    Case("box", between, ((4,), (4,), (4,)), positive=(2,), event=0),
    Case("halfspace", project_halfspace, ((4,), (4,), ())),
    Case("affine", project_affine, ((4,), (2, 4), (2,))),
    Case("simplex", project_simplex, ((4,), ()), positive=(1,)),
    Case("l1 ball", project_l1_ball, ((4,), ()), positive=(1,)),
    Case("l2 ball", project_l2_ball, ((4,), ()), positive=(1,)),
    Case("second-order cone", project_second_order_cone, ((4,),)),
    Case("psd cone", project_psd, ((4, 4),), event=2, compiles=False),
    Case("sparsemax", sparsemax, ((4,),)),
    Case("entmax", entmax, ((4,),)),
    Case("entmax, alpha", lambda x, a: entmax(x, 1 + a), ((4,), ()), positive=(1,), compiles=False),
]
SETS = [case for case in CASES if "max" not in case.name]
CONES = {"second-order cone", "psd cone"}
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_set = pytest.mark.parametrize("case", SETS, ids=str)


def least_distance(x, **blocks):
    """The same by the QP solver."""
    return solve_qp(torch.eye(x.shape[-1]), -x, **blocks).x


def l1_by_qp(x, radius):
    """``x = u - v`` with ``u, v ≥ 0``."""
    n = x.shape[-1]
    signs = torch.cat([torch.eye(n), -torch.eye(n)])
    u = solve_qp(signs @ signs.T, -x @ signs.T, torch.ones(1, 2 * n), radius.unsqueeze(-1), lb=torch.zeros(2 * n)).x
    return u @ signs


BY_QP = {
    "box": lambda x, lower, width: least_distance(x, lb=lower, ub=lower + width),
    "halfspace": lambda x, normal, offset: least_distance(x, G=normal.unsqueeze(-2), h=offset.unsqueeze(-1)),
    "affine": lambda x, A, b: least_distance(x, A=A, b=b),
    "simplex": lambda x, r: least_distance(x, A=torch.ones(1, 4), b=r.unsqueeze(-1), lb=torch.zeros(4)),
    "l1 ball": l1_by_qp,
    "sparsemax": lambda x: least_distance(x, A=torch.ones(1, 4), b=torch.ones(1), lb=torch.zeros(4)),
}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in BY_QP], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_are_those_of_solve_qp(case, seed):
    params = wanting(case.params(seed))
    ours, theirs = case.fn(*params), BY_QP[case.name](*params)
    assert_close(ours, theirs, 1e-12)
    cotangent = torch.randn_like(ours)
    assert_close(*[torch.autograd.grad(value, params, cotangent) for value in (ours, theirs)], 1e-10)


def by_cvxpy(name, x, radius=None):
    y = cvxpy.Variable(x.shape, symmetric=x.ndim == 2)
    if name == "psd cone":
        constraint = y >> 0
    elif name == "l2 ball":
        constraint = cvxpy.norm(y) <= radius
    else:
        constraint = cvxpy.SOC(y[0], y[1:])
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(y - x)), [constraint])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return y.value


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CONES | {"l2 ball"}], ids=str)
def test_values_are_those_of_cvxpy(case):
    params = [p.numpy() for p in case.params(1)]
    expected = [by_cvxpy(case.name, *sample) for sample in zip(*params, strict=True)]
    np.testing.assert_allclose(case.fn(*params), expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 1.7, 2.0, 3.0])
def test_entmax_satisfies_its_optimality_conditions(alpha):
    x = torch.randn(50, 12) * 2
    p = entmax(x, alpha)
    assert_close(p.sum(-1), torch.ones(50), 1e-12)
    assert bool((p >= 0).all())
    # x - p^(α-1)/(α-1) is the multiplier of the sum where p > 0, and no larger elsewhere; for 1 it is x - log p.
    slope = x - (p.log() if alpha == 1 else p ** (alpha - 1) / (alpha - 1))
    multiplier = torch.where(p > 0, slope, -torch.inf).amax(-1, keepdim=True)
    assert_close(torch.where(p > 1e-9, slope, multiplier), multiplier.expand_as(x), 1e-7)
    assert bool((slope <= multiplier + 1e-9).all())


def test_entmax_by_sorting_is_entmax_by_bisection():
    x = torch.randn(40, 9) * 3
    assert_close(entmax(x, 1.5), entmax(x, torch.tensor(1.5)), 1e-13)
    assert_close(sparsemax(x), entmax(x, torch.tensor(2.0)), 1e-13)
    assert_close(entmax(x, 1.0), torch.softmax(x, -1), 1e-15)
    assert_close(entmax(x, 1.0001), torch.softmax(x, -1), 1e-3)


@settings(max_examples=40, deadline=None)
@given(
    x=st.lists(st.lists(st.floats(-1e6, 1e6), min_size=7, max_size=7), min_size=1, max_size=4),
    radius=st.floats(1e-3, 1e6),
)
def test_simplex_by_cutting_is_simplex_by_sorting(x, radius):
    x = torch.tensor(x, dtype=torch.float64)
    cut, sorted_ = project_simplex(x, radius), vmap(lambda x: project_simplex(x, radius))(x)
    assert_close(cut / radius, sorted_ / radius, 1e-9)


def test_simplex_by_cutting_ends_on_hard_rows():
    n = 2000
    x = torch.stack([-(0.99 ** torch.arange(n)), -((torch.arange(n) / n) ** 3), torch.zeros(n), torch.arange(n) * 1.0])
    for radius in 1e-6, 1.0, 1e3:
        assert_close(project_simplex(x, radius), vmap(lambda x, r=radius: project_simplex(x, r))(x), 1e-11)


@every_case
def test_gradients(case):
    params = wanting(case.params(2))
    options = {"check_batched_grad": True}
    assert gradcheck(case.fn, params, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(case.fn, params, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in {"psd cone", "l2 ball", "entmax, alpha"}], ids=str)
def test_third_derivatives(case):
    params = wanting(case.params(2))
    directions = [torch.randn_like(p) for p in params]

    def slope(*params):
        gradients = torch.autograd.grad(cubed(case.fn)(*params), params, create_graph=True)
        return sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    assert gradgradcheck(slope, params)


@every_case
def test_transforms(case):
    """Against the eager tape, sample by sample."""
    params, loss = case.params(3), cubed(case.fn)
    every = tuple(range(len(params)))
    tracked = wanting(params)
    expected = torch.autograd.grad(loss(*tracked), tracked)
    assert_close(grad(loss, every)(*params), expected)
    assert_close(jacfwd(loss, every)(*params), expected)
    assert_close(vmap(grad(loss, every))(*params), expected)
    assert_close(vmap(case.fn)(*params), case.fn(*params), 1e-14)
    assert_close(vmap(vmap(case.fn))(*[p.unsqueeze(1) for p in params]).squeeze(1), case.fn(*params), 1e-14)
    one = [p[0] for p in params]
    assert_close(vmap(case.fn, (0, *[None] * (len(params) - 1)))(params[0], *one[1:]), case.fn(params[0], *one[1:]))
    reference = torch.autograd.functional.hessian(loss, params)
    assert_close(hessian(loss, every)(*params), reference)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd)):
        assert_close(outer(inner(loss, every), every)(*params), reference)


@compiles
@every_case
def test_compiled_is_eager(case):
    params = wanting(case.params())
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what dynamo looks at
        compiled = torch.compile(case.fn, backend="aot_eager", fullgraph=case.compiles)(*params)
    value = case.fn(*params)
    assert_close(compiled, value, 1e-14)
    grads = [torch.autograd.grad(v.pow(3).sum(), params) for v in (compiled, value)]
    assert_close(*grads, 1e-14)


def inner(a, b, event):
    return (a * b).flatten(a.dim() - event).sum(-1)


@every_set
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e2, 1e8]))
def test_projections_are_projections(case, seed, scale):
    """Idempotent, nonexpansive, and ``⟨x - Π(x), c - Π(x)⟩ ≤ 0`` for all ``c`` in the set, which is optimality."""
    torch.set_default_dtype(torch.float64)
    x, *rest = case.params(seed)
    x, other, third = scale * x, scale * x.roll(1, 0) + torch.randn_like(x), 3 * scale * torch.randn_like(x)
    points = [case.fn(p, *rest) for p in (x, other, third)]
    event = max(case.event, 1)
    size = 1 + scale + sum(r.abs().amax() for r in rest)
    for point in points:
        assert_close(case.fn(point, *rest) / size, point / size, 1e-12)
    gap = (points[0] - points[1]).flatten(1).norm(dim=1) - (x - other).flatten(1).norm(dim=1)
    assert bool((gap <= 1e-12 * size).all())
    for feasible in points[1:]:
        normal = x - points[0]
        normal = (normal + normal.mT) / 2 if event == 2 else normal
        assert bool((inner(normal, feasible - points[0], event) <= 1e-11 * size**2).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-150, 1e-3, 1.0, 1e6, 1e150]))
def test_answers_are_feasible(seed, scale):
    rng = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(5, 6, generator=rng, dtype=torch.float64)
    r = 0.1 + torch.rand(5, generator=rng, dtype=torch.float64)
    simplex, l1, l2, soc = (
        project_simplex(x, r),
        project_l1_ball(x, r),
        project_l2_ball(x, r),
        project_second_order_cone(x),
    )
    assert bool((simplex >= 0).all())
    assert_close(simplex.sum(-1), r, 1e-13)
    assert bool((l1.abs().sum(-1) <= r * (1 + 8 * EPS)).all())
    assert bool((l2.norm(dim=-1) <= r * (1 + 8 * EPS)).all())
    scaled = soc / max(scale, 1e-150)
    assert bool((scaled[:, 1:].norm(dim=-1) <= scaled[:, 0] * (1 + 8 * EPS)).all())


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_psd_is_its_moreau_decomposition(scale):
    X = torch.randn(20, 7, 7)
    X = scale * (X + X.mT)
    positive, negative = project_psd(X), project_psd(-X)
    assert_close((positive - negative) / scale, X / scale, 1e-12)
    assert float((positive * negative).sum((-2, -1)).abs().max()) <= 1e-11 * scale**2
    assert float(torch.linalg.eigvalsh(positive).min()) >= -1e-13 * scale


def quadratic_form(Q, values):
    return (Q * values) @ Q.mT


@pytest.mark.parametrize("values", [[2.0, 2.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-3.0] * 4, [5.0, 5.0, 5.0, -5.0]])
def test_psd_derivatives_where_eigenvalues_meet(values):
    """Where autograd of eigh is NaN: the closed form, and finite differences to second order."""
    Q = torch.linalg.qr(torch.randn(4, 4))[0]
    values = torch.tensor(values)
    X = quadratic_form(Q, values).requires_grad_()
    E = torch.randn(4, 4)
    E = E + E.mT
    positive = values.relu()
    size = values.abs()[:, None] + values.abs()
    expected = Q @ ((positive[:, None] + positive) / size * (Q.mT @ E @ Q)) @ Q.mT
    assert_close(torch.func.jvp(project_psd, (X.detach(),), (E,))[1], expected, 1e-13)
    assert_close(torch.autograd.grad(project_psd(X), X, E)[0], expected, 1e-13)
    assert gradcheck(project_psd, X)
    assert gradgradcheck(project_psd, X)


def test_psd_second_derivative_of_a_definite_matrix_is_zero():
    X = torch.diag(torch.tensor([1e-9, 1.0, 1.0, 3.0]))
    assert_close(hessian(cubed(project_psd))(X), hessian(cubed(lambda X: (X + X.mT) / 2))(X), 1e-14)


def test_psd_at_a_zero_eigenvalue_takes_the_smallest_element():
    direction = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    for top in 1.0, -1.0, 0.0:
        X = torch.diag(torch.tensor([top, 0.0])).requires_grad_()
        assert_close(torch.autograd.grad(project_psd(X), X, direction)[0], torch.zeros(2, 2))
    low_rank = torch.outer(v := torch.randn(6), v).requires_grad_()
    assert_close(project_psd(low_rank), low_rank, 1e-14)
    Q = torch.linalg.qr(torch.randn(6, 6))[0]
    E = Q + Q.mT
    unit = (v / v.norm())[:, None] @ (v / v.norm())[None]
    rest = torch.eye(6) - unit
    assert_close(torch.autograd.grad(project_psd(low_rank), low_rank, E)[0], E - rest @ E @ rest, 1e-12)


def jacobian(fn, *point):
    return jacrev(fn)(torch.tensor(point))


def test_kinks_give_the_documented_element():
    identity, zero = torch.eye(3), torch.zeros(3, 3)
    assert_close(jacobian(project_second_order_cone, 5.0, 3.0, 4.0), identity)
    assert_close(jacobian(project_second_order_cone, 0.0, 0.0, 0.0), identity)
    assert_close(jacobian(project_second_order_cone, -5.0, 3.0, 4.0), zero)
    assert_close(jacobian(project_second_order_cone, -1.0, 0.0, 0.0), zero)
    assert_close(jacobian(lambda x: project_l2_ball(x, 5.0), 3.0, 4.0, 0.0), identity)
    assert_close(jacobian(lambda x: project_l1_ball(x, 7.0), 3.0, -4.0, 0.0), identity)
    assert_close(jacobian(lambda x: project_box(x, 0.0, 1.0), 0.0, 1.0, 0.5), identity)
    assert_close(jacobian(lambda x: project_halfspace(x, torch.ones(3), 6.0), 1.0, 2.0, 3.0), identity)
    half = torch.tensor([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]])
    assert_close(jacobian(project_simplex, 0.5, 0.5, 0.0), half)


@every_case
def test_a_bad_sample_leaves_the_others_alone(case):
    params = [p.clone() for p in case.params()]
    expected = case.fn(*params)
    gradients = torch.autograd.grad(case.fn(*(tracked := wanting(params)))[[0, 2]].pow(3).sum(), tracked)
    for which in range(len(params)):
        broken = [p.clone() for p in params]
        broken[which][1] = torch.nan
        tracked = wanting(broken)
        value = case.fn(*tracked)
        assert bool(value[1].isnan().all())
        assert_close(value[[0, 2]], expected[[0, 2]], 1e-14)
        ours = torch.autograd.grad(torch.where(value.isnan(), 0, value).pow(3).sum(), tracked)
        assert_close(ours, gradients, 1e-13)
        assert all(bool((g[1] == 0).all()) for g in ours)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(case, dtype):
    params = [p.to(dtype) for p in case.params()]
    value = case.fn(*params)
    assert value.dtype == dtype
    exact = case.fn(*[p.double() for p in params])
    assert_close(value.double(), exact, 8 * torch.finfo(dtype).eps * (30 if case.name == "affine" else 1))


@every_case
def test_autocast_changes_nothing(case):
    params = [p.float() for p in case.params()]
    expected = case.fn(*params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.fn(*params), expected)


@every_case
def test_arrays_in_arrays_out(case):
    params = case.params()
    value = case.fn(*[p.numpy() for p in params])
    assert isinstance(value, np.ndarray)
    np.testing.assert_allclose(value, case.fn(*params), atol=1e-15)


@every_case
def test_empty_batch_and_more_batch_dimensions(case):
    params = case.params()
    empty = wanting([p[:0] for p in params])
    value = case.fn(*empty)
    assert value.shape == empty[0].shape
    assert all(g.shape == e.shape for g, e in zip(torch.autograd.grad(value.sum(), empty), empty, strict=True))
    grid = [torch.stack([p, p.flip(0)]) for p in params]
    assert_close(case.fn(*grid)[1], case.fn(*params).flip(0), 1e-14)


@pytest.mark.parametrize("fn", [project_simplex, project_l1_ball, project_l2_ball, entmax, sparsemax])
def test_dim(fn):
    x = torch.randn(4, 5, 3)
    assert_close(fn(x, dim=1), fn(x.movedim(1, -1)).movedim(-1, 1), 1e-15)
    assert_close(fn(x, dim=-3), fn(x.movedim(0, -1)).movedim(-1, 0), 1e-15)


def test_shared_parameters_collect_gradients_of_all_samples():
    x, radius = torch.randn(5, 4), torch.tensor(1.3, requires_grad=True)
    every = radius.detach().expand(5).clone().requires_grad_()
    cotangent = torch.randn(5, 4)
    (shared,) = torch.autograd.grad(project_simplex(x, radius), radius, cotangent)
    (single,) = torch.autograd.grad(project_simplex(x, every), every, cotangent)
    assert_close(shared, single.sum(), 1e-14)
    assert project_simplex(x[0], every).shape == (5, 4)
    assert project_simplex(x.T, every, dim=0).shape == (4, 5)


def test_sides_of_a_box():
    x = torch.linspace(-2, 2, 5)
    assert_close(project_box(x, lower=-1), x.clamp(min=-1))
    assert_close(project_box(x, upper=torch.tensor(1.0)), x.clamp(max=1))
    assert_close(project_box(x, -torch.inf, torch.inf), x)
    assert_close(project_box(x), x)
    assert project_box(torch.tensor(3.0), 0, 1).item() == 1


def test_redundant_and_contradictory_rows():
    x = torch.randn(2, 4)
    row = torch.randn(1, 4)
    A, b = torch.cat([row, 2 * row]), torch.tensor([[1.0, 2.0], [1.0, 3.0]])
    value = project_affine(x, A, b)
    assert_close(value[0], project_affine(x[0], row, torch.ones(1)), 1e-13)
    assert bool(value[1].isnan().all())
    assert_close(project_affine(x, torch.zeros(0, 4), torch.zeros(0)), x)
    assert project_affine(x[0], torch.zeros(0, 4), torch.zeros(3, 0)).shape == (3, 4)


def test_sizes_at_the_end_of_the_range():
    assert_close(project_l2_ball(torch.tensor([3e-200, 4e-200]), 1e-200), torch.tensor([0.6e-200, 0.8e-200]), 1e-15)
    assert_close(project_l2_ball(torch.tensor([3e200, 4e200])), torch.tensor([0.6, 0.8]), 1e-15)
    assert_close(project_simplex(torch.tensor([1e17, 1e17, 0.0])), torch.tensor([0.5, 0.5, 0.0]))
    assert_close(
        project_halfspace(torch.tensor([2.0, 0.0]), torch.tensor([1e-200, 0.0]), 1e-200), torch.tensor([1.0, 0])
    )
    assert project_l2_ball(torch.zeros(2, 0)).shape == (2, 0)
    assert project_l1_ball(torch.zeros(2, 0)).shape == (2, 0)
    assert project_psd(torch.zeros(2, 0, 0)).shape == (2, 0, 0)
    assert_close(project_second_order_cone(torch.tensor([[2.0], [-2.0]])), torch.tensor([[2.0], [0.0]]))


x34 = torch.zeros(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project_simplex(x34, 0), r"radius must be positive and finite, got 0\.0"),
        (lambda: project_l1_ball(x34, torch.tensor([1.0, -2.0, 1.0])), r"got -2\.0 in sample \(1,\)"),
        (lambda: project_l2_ball(x34, math.inf), "radius must be positive and finite, got inf"),
        (lambda: project_simplex(x34, torch.ones(2)), r"don't broadcast: x \(3, 4\) .*radius \(2,\)"),
        (lambda: project_simplex(x34, torch.ones(3).float()), "radius is torch.float32.*x is torch.float64"),
        (lambda: project_simplex(x34, "1"), "radius must be a number, a tensor or an array, got str"),
        (lambda: project_simplex(x34, dim=2), r"dim is 2, but x has shape \(3, 4\)"),
        (lambda: project_simplex(torch.zeros(3, 0)), "without entries has no points"),
        (lambda: project_simplex(torch.zeros(3, 4, dtype=torch.int64)), "real floating point, got torch.int64"),
        (lambda: project_simplex([1.0, 2.0]), "real floating point, got list"),
        (lambda: project_simplex(torch.tensor(1.0)), r"x \(\) as \(\*batch, n\) has too few dimensions"),
        (lambda: project_box(x34, 1.0, torch.zeros(4)), "lower 1 is above upper 0 in 4 entries"),
        (lambda: project_box(x34, torch.zeros(3)), "don't broadcast"),
        (lambda: project_halfspace(x34, torch.zeros(4), 1.0), "normal must be other than zero"),
        (lambda: project_halfspace(x34, torch.ones(5), 1.0), r"n is 4 or 5: x \(3, 4\) .*normal \(5,\)"),
        (lambda: project_affine(x34, torch.ones(2, 4), torch.ones(3)), r"p is 2 or 3: A \(2, 4\) .*b \(3,\)"),
        (lambda: project_psd(x34), r"n is 3 or 4: x \(3, 4\) as \(\*batch, n, n\)"),
        (lambda: project_second_order_cone(torch.zeros(3, 0)), "at least the entry t"),
        (lambda: entmax(x34, 0.5), "alpha must be above one and finite, got 0.5"),
        (lambda: entmax(x34, torch.ones(3)), "alpha must be above one"),
        (lambda: project_simplex(x34.numpy(), torch.ones(3, requires_grad=True)), "x is a NumPy array"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(ProblemError, match=message):
        call()


def test_inside_a_transform_a_senseless_sample_is_nan():
    radii = torch.tensor([1.0, -1.0])
    value = vmap(project_simplex)(torch.zeros(2, 4), radii)
    assert_close(value[0], torch.full((4,), 0.25))
    assert bool(value[1].isnan().all())
    assert bool(vmap(project_box)(torch.zeros(1, 4), torch.ones(1, 4), torch.zeros(1, 4)).isnan().all())


SPECIAL = {
    "zero": torch.zeros,
    "ties": torch.ones,
    "negative ties": lambda n: -torch.ones(n),
    "at the boundary": lambda n: torch.full((n,), 1 / n),
    "a vertex": lambda n: torch.eye(n)[0],
    "a far one": lambda n: torch.full((n,), 1e8),
}
PLAIN = {
    "box": lambda x: project_box(x, -1, 1),
    "halfspace": lambda x: project_halfspace(x, torch.ones_like(x), 0.0),
    "affine": lambda x: project_affine(x, torch.ones(1, x.shape[-1]), torch.zeros(1)),
    "simplex": project_simplex,
    "l1 ball": project_l1_ball,
    "l2 ball": project_l2_ball,
    "second-order cone": project_second_order_cone,
    "psd cone": lambda x: project_psd(torch.diag_embed(x)),
    "sparsemax": sparsemax,
    "entmax": entmax,
    "entmax, alpha": lambda x: entmax(x, 1.3),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("point", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("project", PLAIN.values(), ids=PLAIN)
def test_no_nan_at_special_points(project, point, size):
    x = point(size)
    for value in (project(x), jacrev(project)(x), jacfwd(project)(x), hessian(lambda x: project(x).sin().sum())(x)):
        assert value.isfinite().all()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("project", PLAIN.values(), ids=PLAIN)
def test_no_samples_have_no_gradients(project, size):
    x = torch.zeros(2, 0, size, requires_grad=True)
    value = project(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.shape[:2] == (2, 0)
    assert gradient.shape == x.shape


def test_cone_of_one_entry_is_the_half_line():
    x = torch.tensor([[2.0], [-3.0]], requires_grad=True)
    value = project_second_order_cone(x)
    assert value.tolist() == [[2.0], [0.0]]
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == [[1.0], [0.0]]


def test_origin_of_a_subspace_is_no_contradiction():
    x = torch.ones(2, requires_grad=True)
    value = project_affine(x, torch.ones(1, 2), torch.zeros(1))
    assert_close(value, torch.zeros(2), 1e-15)
    assert_close(jacrev(lambda x: project_affine(x, torch.ones(1, 2), torch.zeros(1)))(x), torch.eye(2) - 0.5, 1e-15)
