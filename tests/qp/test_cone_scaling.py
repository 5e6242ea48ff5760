"""Cone programs in any units: the same statuses, answers and derivatives."""

import pytest
import torch

from difflayers import Status
from difflayers.qp import Cones, CvxpyLayer, LPGDAdjoint, solve_cone
from difflayers.qp._cone_scaling import Units, extreme, plain
from difflayers.qp._data import Data

UNITS = [1e-12, 1e-9, 1e-6, 1e-3, 1e3, 1e6, 1e9]


@pytest.fixture(scope="module")
def portfolio():
    cp = pytest.importorskip("cvxpy")
    n = 6
    w, mu, root = cp.Variable(n), cp.Parameter(n), cp.Parameter((n, n))
    problem = cp.Problem(cp.Minimize(cp.norm(root @ w) - mu @ w), [cp.sum(w) == 1, w >= 0])
    return CvxpyLayer(problem, parameters=[mu, root], variables=[w], on_failure="ignore")


def returns():
    generator = torch.Generator().manual_seed(0)
    mean = 0.3 * torch.randn(20, 6, generator=generator) + 0.1
    return mean, torch.randn(20, 6, 6, generator=generator)


def weights_and_gradient(layer, unit):
    mean, root = returns()
    mean = (mean * unit).requires_grad_()
    solution = layer.solve(mean, root * unit)
    assert solution.ok.all()
    assert (solution.stats["residual"] <= 1e-12).all()
    (w,) = solution.value
    (gradient,) = torch.autograd.grad((w * torch.arange(6)).sum(), mean)
    return w.detach(), gradient * unit


@pytest.mark.parametrize("unit", UNITS)
def test_a_portfolio_is_the_same_in_any_unit_of_returns(portfolio, unit):
    w, gradient = weights_and_gradient(portfolio, 1.0)
    other, moved = weights_and_gradient(portfolio, unit)
    torch.testing.assert_close(other, w, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved, gradient, rtol=1e-10, atol=1e-10)


def nearest(center, radius, **options):
    """The nearest point of a disk."""
    C, d = -torch.eye(3)[:, 1:], torch.stack([radius, 0 * radius, 0 * radius], -1)
    return solve_cone(torch.eye(2), -center, C, d, Cones(second_order=(3,)), **options)


CENTER = torch.tensor([[3.0, 4.0], [-8.0, 6.0], [0.3, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("unit", UNITS)
def test_samples_have_units_of_their_own(unit):
    radius = torch.tensor([1.0, unit, 1.0])
    center = CENTER * radius[:, None]
    found = nearest(center, radius)
    expected = center / (center.norm(dim=-1) / radius).clamp_min(1)[:, None]
    torch.testing.assert_close(found.x, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.y[:, 1:], found.x - center, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(found.s[:, 1:], found.x, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sparse_data_and_float32(dtype):
    unit = 1e-6
    center, radius = (unit * CENTER).to(dtype), torch.full((3,), unit, dtype=dtype)
    d = torch.stack([radius, 0 * radius, 0 * radius], -1)
    C, P = (-torch.eye(3)[:, 1:].to(dtype).to_sparse(), torch.eye(2, dtype=dtype).to_sparse())
    found = solve_cone(P, -center, C, d, Cones(second_order=(3,)))
    expected = nearest(CENTER, torch.ones(3)).x * unit
    torch.testing.assert_close(found.x, expected.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_derivatives_of_every_order_and_mode(unit):
    center = CENTER[0] * unit

    def first(center):
        return nearest(center, torch.tensor(unit)).x[0] / unit

    # r (I - uuᵀ)/‖c‖ in the direction of the first unknown, and what that is differentiated.
    u, size = CENTER[0] / 5, 5 * unit
    gradient = (torch.tensor([1.0, 0.0]) - u[0] * u) / size
    torch.testing.assert_close(torch.func.grad(first)(center), gradient, rtol=1e-10, atol=0)
    push = torch.tensor([0.5, -1.0]) * unit
    along = torch.func.jvp(first, (center,), (push,))[1]
    torch.testing.assert_close(along, gradient @ push, rtol=1e-10, atol=1e-14)

    def closed(c):
        return c[0] / c.norm()

    hessian = torch.func.hessian(closed)(CENTER[0])
    torch.testing.assert_close(torch.func.hessian(first)(center) * unit**2, hessian, rtol=1e-8, atol=1e-10)
    many = torch.func.vmap(lambda c: nearest(c, torch.tensor(unit)).x)(CENTER[:2] * unit)
    torch.testing.assert_close(many, CENTER[:2] / CENTER[:2].norm(dim=-1, keepdim=True) * unit, rtol=1e-10, atol=0)


@pytest.mark.parametrize("unit", UNITS)
def test_a_solution_is_a_warm_start_in_any_units(unit):
    center, radius = CENTER * unit, torch.full((3,), unit)
    init = nearest(center, radius)
    again = nearest(1.001 * center, 2 * radius, init=init)
    torch.testing.assert_close(again.x, nearest(1.001 * center, 2 * radius).x, rtol=1e-10, atol=1e-300)
    same = nearest(center, radius, init=init)
    assert (same.stats["steps"] == 0).all()


@pytest.mark.parametrize("unit", UNITS)
def test_proofs_hold_in_any_units(unit):
    cones = Cones(zero=1, second_order=(3,))
    # ‖x‖ ≤ unit, but x₀ = 2 unit
    C = torch.cat([torch.tensor([[1.0, 0.0]]), -torch.eye(3)[:, 1:]])
    d = torch.tensor([2.0, 1.0, 0.0, 0.0]) * unit
    found = solve_cone(torch.eye(2), torch.zeros(2), C, d, cones, on_failure="ignore")
    assert int(found.status) == Status.INFEASIBLE
    y = found.stats["certificate"][2:]
    assert (C.mT @ y).abs().amax() <= 1e-6 * y.abs().amax()
    assert d @ y < 0
    # x₀ ≥ ‖(x₁, unit)‖, the more of x₀ the better
    cone, side = -torch.eye(3)[:, :2], torch.tensor([0.0, 0.0, 1.0]) * unit
    found = solve_cone(None, torch.tensor([-unit, 0.0]), cone, side, Cones(second_order=(3,)), on_failure="ignore")
    assert int(found.status) == Status.UNBOUNDED
    assert found.stats["certificate"][0] > 0


@pytest.mark.parametrize("unit", UNITS)
def test_linear_and_quadratic_programs_too(unit):
    cones, C = Cones(zero=1, nonnegative=3), torch.cat([torch.ones(1, 3), -torch.eye(3)])
    d = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]) * unit  # on a simplex, and where nothing is
    point = (torch.tensor([0.5, 0.4, -1.0]) * unit).requires_grad_()
    found = solve_cone(torch.eye(3), -point, C, d, cones, on_failure="ignore")
    assert found.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE]
    torch.testing.assert_close(found.x[0].detach() / unit, torch.tensor([0.55, 0.45, 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.y[0].detach() / unit, torch.tensor([-0.05, 0, 0, 0.95]), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.x[0, 0], point)
    torch.testing.assert_close(gradient, torch.tensor([0.5, -0.5, 0]), rtol=0, atol=1e-12)
    y = found.stats["certificate"][1, 3:]
    assert d[1] @ y < 0
    assert (C.mT @ y).abs().amax() <= 1e-6 * y.abs().amax()
    again = solve_cone(
        torch.eye(3), -point, C, d[:1], cones, init=solve_cone(torch.eye(3), -point, C, 2 * d[:1], cones)
    )
    torch.testing.assert_close(again.x, found.x[:1], rtol=1e-12, atol=0)
    assert (again.stats["steps"] == 0).all()


def test_programs_without_rows():
    q = torch.tensor([1e-9, 2e-9])
    free = solve_cone(torch.eye(2), q, torch.zeros(0, 2), torch.zeros(0), Cones())
    torch.testing.assert_close(free.x, -q)


def test_lpgd_perturbs_in_units_of_the_caller():
    center = (CENTER * 1e-3).requires_grad_()
    gradients = [
        torch.autograd.grad(nearest(center, torch.full((3,), 1e-3), adjoint=adjoint).x.sum(), center)[0]
        for adjoint in (None, LPGDAdjoint(tau=1e-7, envelope="average"))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_plain_numbers_stay_as_they_are():
    C, d = -torch.eye(3)[:, 1:], torch.tensor([1.0, 0.0, 0.0])
    data = Data(torch.eye(2), -CENTER, C, d)
    cones = Cones(second_order=(3,))
    assert plain(data)
    assert not extreme(data, 3).any()
    units = Units.of(data, cones, torch.tensor([True, False, True]))
    assert (torch.cat([units.x, units.y, units.s], -1)[1] == 1).all()
    assert (torch.frexp(torch.cat([units.x, units.y, units.s], -1)).mantissa == 0.5).all()
