"""minimize and least_squares: closed forms, derivatives, and objectives without a bottom."""

import contracts
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ProblemError, SolverError
from difflayers.fixedpoint import LBFGS, Dogleg, LevenbergMarquardt, Newton, least_squares, minimize

DESCENT = [LBFGS(rtol=1e-12, atol=1e-12), Newton(rtol=1e-12, atol=1e-12)]
TRUST = [LevenbergMarquardt(rtol=1e-12, atol=1e-13), Dogleg(rtol=1e-12, atol=1e-13)]


def softly(z, a, b):
    """Strictly convex in ``z``."""
    return (torch.cosh(z) + 0.5 * a * z**2 - b * z).sum(-1)


def curve(z, y, t):
    return z[..., :1] * torch.exp(-z[..., 1:] * t) - y


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 4), n=st.integers(1, 6), seed=st.integers(0, 10_000), solver=st.sampled_from(DESCENT))
def test_convex_quadratics(samples, n, seed, solver):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(samples, n, n, generator=generator, dtype=torch.float64)
    P, q = root @ root.mT + torch.eye(n), torch.randn(samples, n, generator=generator, dtype=torch.float64)

    def objective(z, P, q):
        return 0.5 * (z * (P @ z.unsqueeze(-1)).squeeze(-1)).sum(-1) + (q * z).sum(-1)

    value = minimize(objective, torch.zeros(samples, n), (P, q), batch_dims=1, solver=solver).value
    torch.testing.assert_close(value, torch.linalg.solve(P, -q), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", DESCENT, ids=repr)
def test_derivatives_of_a_minimum(solver):
    a, b = torch.rand(3, 4), torch.randn(3, 4)

    def call(a, b):
        return minimize(softly, torch.zeros(3, 4), (a, b), batch_dims=1, solver=solver).value

    params = contracts.wanting((a, b))
    assert torch.autograd.gradcheck(call, params, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, params)
    z = call(a, b)
    # ∇²L dz = db
    contracts.assert_close(torch.func.jvp(call, (a, b), (torch.zeros_like(a), b))[1], b / (torch.cosh(z) + a))
    hessian = torch.func.hessian(lambda b: call(a, b).sum())(b)
    contracts.assert_close(hessian, torch.func.jacrev(torch.func.jacrev(lambda b: call(a, b).sum()))(b))


def test_newton_leaves_saddles_and_lbfgs_stops_there():
    def saddle(z):
        return z[..., 0] ** 2 - z[..., 1] ** 2 + z[..., 1] ** 4 / 4

    start = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.5]])
    least = minimize(saddle, start, batch_dims=1, solver="newton").value
    contracts.assert_close(least.abs(), torch.tensor([[0.0, 2**0.5]]).expand(3, 2), 1e-6)
    assert minimize(saddle, start[1], solver="lbfgs").stats["steps"] == 0


@pytest.mark.parametrize("solver", DESCENT, ids=repr)
@pytest.mark.parametrize("objective", [lambda z: z.sum(-1), lambda z: -(z**2).sum(-1)], ids=["plane", "hill"])
def test_objectives_without_a_bottom(solver, objective):
    solution = minimize(objective, torch.ones(2, 3), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.UNBOUNDED] * 2
    assert solution.value.isnan().all()
    with pytest.raises(SolverError, match="UNBOUNDED"):
        minimize(objective, torch.ones(3), solver=solver)


@pytest.mark.parametrize("solver", DESCENT, ids=repr)
def test_nonfinite_objectives_leave_the_others_alone(solver):
    offset = torch.tensor([0.0, torch.inf, torch.nan])
    center = torch.ones(3, 2, requires_grad=True)
    solution = minimize(
        lambda z, c, o: ((z - c) ** 2).sum(-1) + o, torch.zeros(3, 2), (center, offset), batch_dims=1, solver=solver,
        on_failure="ignore",
    )  # fmt: skip
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.NONFINITE]
    solution.value[solution.ok].sum().backward()
    contracts.assert_close(center.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("solver", TRUST, ids=repr)
def test_linear_least_squares(solver):
    A, b = torch.randn(2, 4, 2), torch.randn(2, 4)

    def call(A, b):
        return least_squares(
            lambda z, A, b: (A @ z.unsqueeze(-1)).squeeze(-1) - b,
            torch.zeros(2, 2),
            (A, b),
            batch_dims=1,
            solver=solver,
        ).value

    contracts.assert_close(call(A, b), torch.linalg.lstsq(A, b.unsqueeze(-1)).solution.squeeze(-1))
    params = contracts.wanting((A, b))
    assert torch.autograd.gradcheck(call, params, check_forward_ad=True)


@pytest.mark.parametrize("solver", [*TRUST, *DESCENT[:1]], ids=repr)
def test_curve_fits_and_their_second_derivatives(solver):
    t = torch.linspace(0, 1, 12)
    y = 2 * torch.exp(-1.5 * t) + 0.1 * torch.randn(2, 12)

    def call(y):
        return least_squares(curve, torch.ones(2, 2), (y, t), batch_dims=1, solver=solver).value

    z = call(y)
    gradient = torch.func.vmap(torch.func.grad(lambda z, y: curve(z, y, t).square().sum() / 2))(z, y)
    assert gradient.abs().max() < 1e-9
    assert torch.autograd.gradcheck(call, contracts.wanting((y,)))
    assert torch.autograd.gradgradcheck(call, contracts.wanting((y,)), atol=1e-4, rtol=1e-3, fast_mode=True)


def test_numpy_and_pytrees():
    value = minimize(
        lambda z: ((z["a"] - 1) ** 2).sum() + (z["b"] + 2) ** 2, {"a": np.zeros(2), "b": np.zeros(())}
    ).value
    np.testing.assert_allclose(value["a"], 1)
    np.testing.assert_allclose(value["b"], -2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: minimize(lambda z: z, torch.ones(3)), r"objective returned shape \(3,\).*one number per sample, \(\)"),
        (lambda: minimize(lambda z: z.sum(), torch.ones(3, 2), batch_dims=1), "one number per sample"),
        (lambda: minimize(lambda z: 1.0, torch.ones(3)), "objective returned float"),
        (lambda: minimize(lambda z: z.detach().sum(), torch.ones(3)), "doesn't depend on its unknown"),
        (lambda: minimize(lambda z: z.sum().float(), torch.ones(3)), "torch.float32, but the unknown is torch.float64"),
        (lambda: least_squares(lambda z: z.sum(0), torch.ones(3, 2), batch_dims=1), r"must begin with \(3,\)"),
        (lambda: minimize(lambda z: z.sum(), torch.ones(3), solver="bfgs"), "did you mean 'lbfgs'"),
    ],
)  # fmt: skip
def test_wrong_calls(call, message):
    with pytest.raises(ProblemError, match=message):
        call()


def test_solvers_that_cannot_descend_are_refused():
    with pytest.raises(TypeError, match=r"use LBFGS\(\), Newton\(\)"):
        minimize(lambda z: (z**2).sum(), torch.ones(2), solver=Dogleg())
