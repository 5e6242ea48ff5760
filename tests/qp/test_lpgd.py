"""LPGD: gradients by a perturbed solve, where exact ones are zero and where they aren't, and what it refuses."""

import contracts
import cvxpy as cp
import numpy as np
import pytest
import torch
from torch.func import grad

from difflayers.errors import ConvergenceWarning, LinearSolveError, ProblemError, UnknownNameError
from difflayers.fixedpoint import root
from difflayers.qp import Cones, CvxpyLayer, LPGDAdjoint, solve_cone, solve_qp


def chosen(cost, count, **options):
    """The ``count`` cheapest, by a linear program."""
    n = cost.shape[-1]
    ones, bounds = torch.ones(1, n), (torch.zeros(n), torch.ones(n))
    return solve_qp(None, cost, None, None, ones, torch.tensor([float(count)]), *bounds, **options).x


def convex(seed=0, samples=3, n=5, m=4):
    generator = torch.Generator().manual_seed(seed)
    L, q, G, A = (torch.randn(*s, generator=generator) for s in ((n, n), (samples, n), (m, n), (1, n)))
    return L @ L.mT + torch.eye(n), q, G, G @ torch.ones(n) * 0.1, A, 0.1 * A.sum(1)


@pytest.mark.parametrize(("envelope", "tolerance"), [("lower", 1e-4), ("upper", 1e-4), ("average", 1e-8)])
def test_small_tau_gives_the_exact_derivative_of_a_quadratic_program(envelope, tolerance):
    def gradients(adjoint):
        blocks = contracts.wanting(convex())
        solution = solve_qp(*blocks, lb=torch.full((5,), -1.0), adjoint=adjoint)
        return torch.autograd.grad(solution.x.pow(3).sum(), blocks)

    found, exact = gradients(LPGDAdjoint(tau=1e-5, envelope=envelope)), gradients(None)
    symmetric = [(P + P.mT) / 2 for P in (found[0], exact[0])]
    contracts.assert_close((symmetric[0], *found[1:]), (symmetric[1], *exact[1:]), tolerance)


def test_small_tau_gives_the_exact_derivative_of_a_cone_program():
    cones = Cones(second_order=(4,), exponential=1)
    generator = torch.Generator().manual_seed(1)
    C, x, v = (torch.randn(*s, generator=generator) for s in ((2, 7, 6), (2, 6), (2, 7)))
    y = cones.project(v)
    P, q = 2 * torch.eye(6), -2 * x - (C.mT @ y.unsqueeze(-1)).squeeze(-1)
    d = (C @ x.unsqueeze(-1)).squeeze(-1) + y - v

    def gradients(adjoint):
        blocks = contracts.wanting((P, q, C, d))
        return torch.autograd.grad(solve_cone(*blocks, cones, adjoint=adjoint).x.pow(3).sum(), blocks)

    found, exact = gradients(LPGDAdjoint(tau=1e-4, envelope="average")), gradients(None)
    contracts.assert_close(found[1:], exact[1:], 1e-5)
    contracts.assert_close(found[0] + found[0].mT, exact[0] + exact[0].mT, 1e-5)


def test_a_selection_is_learned_where_its_exact_derivative_is_zero():
    cost = torch.tensor([[0.1, 0.4, 0.2, 0.9, 0.5], [0.3, 0.8, 0.7, 0.1, 0.2]]).requires_grad_()
    wanted = torch.tensor([[0.0, 1, 0, 1, 0], [1, 0, 1, 0, 0]])
    exact = torch.autograd.grad((chosen(cost, 2) - wanted).pow(2).sum(), cost)[0]
    assert exact.abs().max() < 1e-12
    for _ in range(20):
        loss = (chosen(cost, 2, adjoint=LPGDAdjoint(tau=0.5)) - wanted).pow(2).sum()
        if loss == 0:
            break
        (gradient,) = torch.autograd.grad(loss, cost)
        cost = (cost - 0.1 * gradient).detach().requires_grad_()
    contracts.assert_close(chosen(cost, 2).detach(), wanted, 1e-12)


def test_costs_of_edges_are_learned_from_shortest_paths():
    """Of a diamond with a tail, by a layer: the costs of three edges, from one path."""
    edges = [(0, 1), (0, 2), (1, 3), (2, 3), (1, 2), (3, 4)]
    flow, cost = cp.Variable(len(edges), nonneg=True), cp.Parameter(len(edges))
    leaving = [[(a == node) - (b == node) for a, b in edges] for node in range(5)]
    constraints = [np.array(leaving) @ flow == [1, 0, 0, 0, -1]]
    layer = CvxpyLayer(
        cp.Problem(cp.Minimize(cost @ flow), constraints),
        [cost],
        [flow],
        adjoint=LPGDAdjoint(tau=3.0),
    )
    value = torch.tensor([1.0, 2.1, 1.3, 2.4, 5, 1], requires_grad=True)
    wanted = torch.tensor([1.0, 0, 0, 1, 1, 1])
    optimizer = torch.optim.SGD([value], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        (path,) = layer(value)
        (path - wanted).pow(2).sum().backward()
        optimizer.step()
    contracts.assert_close(layer(value)[0].detach(), wanted, 1e-9)


def test_rho_keeps_a_perturbed_program_bounded():
    """Minimize ``cᵀx`` for ``x ≥ 0``: the answer is zero, and the loss wants more than the cost has."""

    def gradient(adjoint, bounds):
        cost = torch.full((3,), 0.1, requires_grad=True)
        x = solve_qp(None, cost, *bounds, adjoint=adjoint).x
        return torch.autograd.grad((x * torch.tensor([-1.0, -2.0, 1.0])).sum(), cost)[0]

    rows = -torch.eye(3), torch.zeros(3)
    for bounds in (rows, (rows[0].to_sparse(), rows[1])):
        with pytest.raises(LinearSolveError, match="perturbed problem"):
            gradient(LPGDAdjoint(tau=0.5), bounds)
        # The answer of the perturbed one is max(0, -(c + τg)/ρ).
        found = gradient(LPGDAdjoint(tau=0.5, rho=2.0), bounds)
        contracts.assert_close(found, torch.tensor([0.4, 0.9, 0.0]) / 2 / 0.5, 1e-9)


def test_rho_of_sparse_and_dense_curvature():
    P, q, *rest = convex()
    P = torch.diag(P.diagonal())

    def gradient(P):
        wanted = q.clone().requires_grad_()
        solution = solve_qp(P, wanted, *rest, adjoint=LPGDAdjoint(tau=0.1, rho=0.3))
        return torch.autograd.grad(solution.x.pow(2).sum(), wanted)[0]

    contracts.assert_close(gradient(P.to_sparse()), gradient(P), 1e-9)


def test_samples_without_an_answer_give_no_gradient():
    cost, total = torch.rand(3, 4), torch.tensor([[2.0], [9.0], [1.0]])
    cost.requires_grad_()
    with pytest.warns(ConvergenceWarning, match="INFEASIBLE"):
        solution = solve_qp(
            None, cost, None, None, torch.ones(1, 4), total, torch.zeros(4), torch.ones(4),
            adjoint=LPGDAdjoint(tau=2.0), on_failure="warn",
        )  # fmt: skip
    assert solution.x[1].isnan().all()
    (gradient,) = torch.autograd.grad((1 - solution.x[solution.ok]).pow(2).sum(), cost)
    assert gradient[[0, 2]].any()
    assert not gradient[1].any()


def test_what_it_cannot_do():
    cost, adjoint = torch.rand(4, requires_grad=True), LPGDAdjoint()
    x = chosen(cost, 2, adjoint=adjoint)
    with pytest.raises(ProblemError, match="first derivatives only"):
        torch.autograd.grad(x.sum(), cost, create_graph=True)
    with pytest.raises(ProblemError, match=r"torch\.func"):
        grad(lambda c: chosen(c, 2, adjoint=adjoint).sum())(cost)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ProblemError, match="forward mode"):
        chosen(torch.autograd.forward_ad.make_dual(cost.detach(), torch.ones(4)), 2, adjoint=adjoint)
    P, q, G, h, *_ = contracts.wanting(convex())
    with pytest.raises(ProblemError, match="not of multipliers"):
        torch.autograd.grad(solve_qp(P, q, G, h, adjoint=adjoint).z.pow(2).sum(), q)
    with pytest.raises((ProblemError, TypeError), match="use ImplicitAdjoint"):
        root(lambda z: z - 1, torch.zeros(2), adjoint=adjoint)
    with pytest.raises(UnknownNameError, match="did you mean 'lower'"):
        LPGDAdjoint(envelope="lowr")
