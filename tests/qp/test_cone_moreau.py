"""Moreau for cone programs: what Clarabel finds, and what is said where it can't serve."""

import sys

import pytest
import torch

from difflayers import Status
from difflayers.errors import MissingBackendError, UnknownNameError
from difflayers.qp import Clarabel, Cones, CvxpyLayer, Moreau, solve_cone

CONES = {
    "linear": Cones(zero=1, nonnegative=3),
    "second order": Cones(zero=1, nonnegative=2, second_order=(3, 1, 4)),
    "semidefinite": Cones(second_order=(1,), semidefinite=(3, 1), exponential=1),
    "exponential": Cones(nonnegative=1, exponential=2),
    "power": Cones(zero=1, power=(0.3, 0.6)),
}


def interior(cones, *, dual):
    parts = [torch.zeros(cones.zero), torch.ones(cones.nonnegative)]
    parts += [torch.eye(size)[0] for size in cones.second_order]
    parts += [torch.eye(k)[torch.tril_indices(k, k).unbind()] for k in cones.semidefinite]
    parts += [torch.tensor([-1.0, 1.0, 1.0] if dual else [0.0, 1.0, 2.0])] * cones.exponential
    return torch.cat([*parts, *[torch.tensor([1.0, 1.0, 0.0])] * len(cones.power)])


def program(cones, quadratic, samples=3, n=4):
    """With strictly feasible points on both sides."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(samples, *shape, generator=generator)

    root, C, x, v = draw(n, n), draw(cones.rows, n), draw(n), 2 * draw(cones.rows)
    s, y = cones.project(v) - v + interior(cones, dual=False), cones.project(v) + interior(cones, dual=True)
    P = root @ root.mT + 0.1 * torch.eye(n) if quadratic else None
    given = 0 if P is None else (P @ x[..., None])[..., 0]
    return P, -(given + (y[:, None] @ C)[:, 0]), C, (C @ x[..., None])[..., 0] + s


@pytest.mark.parametrize("quadratic", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", CONES)
def test_finds_what_clarabel_finds(kind, sparse, quadratic):
    pytest.importorskip("moreau")
    P, q, C, d = program(CONES[kind], quadratic)
    if sparse:
        P, C = None if P is None else P[0].to_sparse(), C[0].to_sparse()
        d, q = d[:1], q[:1]
    answers, gradients = [], []
    for solver in ("moreau", "clarabel"):
        leaf = q.clone().requires_grad_()
        found = solve_cone(P, leaf, C, d, CONES[kind], solver=solver)
        answers.append(torch.cat([found.x, found.y, found.s], -1).detach())
        gradients.append(torch.autograd.grad(found.x.pow(2).sum(), leaf)[0])
    torch.testing.assert_close(*answers, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_a_sample_without_a_solution_among_healthy_ones():
    pytest.importorskip("moreau")
    cones = CONES["second order"]
    P, q, C, d = program(cones, True)
    C[1], d[1] = 0, -1.0
    d[2, 0] = torch.nan
    found = solve_cone(P, q, C, d, cones, solver=Moreau(tol=1e-8), on_failure="ignore")
    assert found.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE, Status.NONFINITE]
    assert (found.stats["steps"][:2] > 0).all()
    assert isinstance(found.solver, Moreau)
    short = solve_cone(P[:1], q[:1], C[:1], d[:1], cones, solver=Moreau(max_steps=1), on_failure="ignore")
    assert int(short.stats["steps"][0]) == 1


def test_layers_mean_it_and_keep_bounds():
    pytest.importorskip("moreau")
    cp = pytest.importorskip("cvxpy")
    x, a, bound = cp.Variable(3), cp.Parameter(3), cp.Variable(3, nonneg=True)
    for constraints in ([x >= 0], [x == bound], [x <= 0.5, x >= 0, cp.norm(x) <= 2]):
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), constraints)
        layer = CvxpyLayer(problem, [a], [x], solver="MOREAU", solver_args={"eps": 1e-8, "max_iter": 100})
        assert layer.solver == Moreau(tol=1e-8, max_steps=100)
        value = torch.tensor([1.0, -2.0, 0.3])
        (found,) = layer(value)
        expected = value.clamp(0, 0.5) if len(constraints) == 3 else value.clamp_min(0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert isinstance(layer.solve(value).cone.solver, Moreau)
    chosen = CvxpyLayer(problem, [a], [x], solver_args={"solve_method": "MOREAU"}).solver
    assert isinstance(chosen, Moreau)


def test_what_it_has_not():
    cones = CONES["second order"]
    with pytest.raises(TypeError, match=r"can't serve here: its active-set method .* use Moreau\(\)"):
        solve_cone(*program(cones, True), cones, solver=Moreau(method="active_set"))
    cp = pytest.importorskip("cvxpy")
    x, a = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.norm(x - a)))
    with pytest.raises(UnknownNameError, match="option of Moreau 'threads'"):
        CvxpyLayer(problem, [a], [x], solver="moreau", solver_args={"threads": 3})


@pytest.mark.parametrize("kind", ["linear", "second order"])
def test_without_the_package(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "moreau", None)
    given = program(CONES[kind], True)
    with pytest.raises(MissingBackendError, match=r"pip install difflayers\[qp\]"):
        solve_cone(*given, CONES[kind], solver="moreau")
    assert isinstance(solve_cone(*given, CONES[kind]).solver, Clarabel) or kind == "linear"
