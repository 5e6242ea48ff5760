"""The closest feasible problem: as near as a reference, untouched where nothing is wrong, differentiable."""

import contracts
import pytest
import torch

from difflayers.errors import ProblemError
from difflayers.qp import closest_feasible, solve_qp


def test_feasible_problems_stay_as_they_are():
    G, h = torch.randn(3, 5, 4), torch.rand(3, 5)
    contracts.assert_close(closest_feasible(G, h).h, h, 1e-9)


def test_infeasible_sides_move_by_the_least_distance():
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    h = torch.tensor([[-1.0, -2.0, 5.0], [3.0, -2.0, 5.0]])  # x ≤ -1 and x ≥ 2; and x ≤ 3 and x ≥ 2
    A, b = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1.0, 3.0])  # y = 1 and y = 3
    sides = closest_feasible(G, h, A, b)
    contracts.assert_close(sides.h, torch.tensor([[0.5, -0.5, 5.0], [3.0, -2.0, 5.0]]), 1e-9)
    contracts.assert_close(sides.b, torch.tensor([[2.0, 2.0]]).expand(2, 2), 1e-9)
    solution = solve_qp(torch.eye(2), torch.zeros(2), G, sides.h, A, sides.b)
    contracts.assert_close(solution.x, torch.tensor([[0.5, 2.0], [2.0, 2.0]]), 1e-9)


def test_bounds_do_not_move():
    sides = closest_feasible(A=torch.ones(1, 2), b=torch.tensor([5.0]), lb=torch.zeros(2), ub=torch.ones(2))
    contracts.assert_close(sides.b, torch.tensor([2.0]), 1e-9)
    assert sides.h is None


def test_derivatives():
    half = torch.randn(3, 3, 2)
    G = torch.cat([half, -half + 0.1 * torch.randn(3, 3, 2)], dim=1).requires_grad_()
    h = (-torch.rand(3, 6) - 1).requires_grad_()  # half-planes on either side of the origin, away from it
    assert torch.autograd.gradcheck(lambda G, h: closest_feasible(G, h).h, (G, h))
    assert (closest_feasible(G, h).h - h).detach().norm(dim=1).min() > 0.1


def test_nothing_to_move():
    with pytest.raises(ProblemError, match="nothing to move"):
        closest_feasible(lb=torch.zeros(2))
