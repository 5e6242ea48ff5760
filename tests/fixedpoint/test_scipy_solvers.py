"""SciPy's minimize and least_squares behind our classes: answers, derivatives, failures, and what a routine may ask."""

import contracts
import numpy as np
import pytest
import scipy
import torch
from scipy.optimize import minimize_scalar

from difflayers import CallableSolver, Status, UnrolledAdjoint
from difflayers.errors import ProblemError, SolverError, UnknownNameError
from difflayers.fixedpoint import ScipyLeastSquares, ScipyMinimize, fixed_point, least_squares, minimize, root

BLIND = ["Nelder-Mead", "Powell", "COBYLA"]
if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 14):
    BLIND.append("COBYQA")
GRADIENT = ["CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP"]
HESSIAN = ["Newton-CG", "dogleg", "trust-ncg", "trust-krylov", "trust-exact", "trust-constr"]
MINIMIZERS = [ScipyMinimize(method) for method in BLIND + GRADIENT + HESSIAN]
FITTERS = [ScipyLeastSquares(method) for method in ("trf", "dogbox", "lm")]


def softly(z, a, b):
    """Strictly convex in ``z``."""
    return (torch.cosh(z) + 0.5 * a * z**2 - b * z).sum(-1)


def raised(z):
    """Least at a value of a thousand, whose last digit hides the last digits of the gradient."""
    return 1e3 + (100 * z[..., 0] - 1) ** 2 + (z[..., 1] - 1) ** 2 + torch.exp(z.sum(-1))


def rosenbrock(z):
    return torch.stack([1 - z[..., 0], 10 * (z[..., 1] - z[..., 0] ** 2)], -1)


def curve(z, y, t):
    return z[..., :1] * torch.exp(-z[..., 1:] * t) - y


@pytest.mark.parametrize("solver", MINIMIZERS, ids=repr)
def test_minima_and_their_derivatives(solver):
    a, b = torch.tensor([[0.5, 1.0], [0.2, 2.0]]), torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    params = contracts.wanting((a, b))
    solution = minimize(softly, torch.zeros(2, 2), params, batch_dims=1, solver=solver)
    z = solution.value
    contracts.assert_close(torch.sinh(z) + a * z, b, 1e-6)
    assert (solution.stats["evaluations"] > 0).all()
    assert (solution.stats["steps"] > 0).all()
    gradients = torch.autograd.grad(z.sum(), params)
    # H dz = db - z da
    inverse = 1 / (torch.cosh(z) + a)
    contracts.assert_close(gradients, (-z * inverse, inverse), 1e-12)


@pytest.mark.parametrize("solver", [s for s in MINIMIZERS if s.method not in ("COBYLA", "CG")], ids=repr)
def test_minima_whose_rounding_hides_the_gradient(solver):
    first = minimize(raised, torch.zeros(2), solver=solver).value
    least = minimize(raised, torch.zeros(2), solver="newton").value
    contracts.assert_close(first, least, 1e-6)
    again = minimize(raised, torch.zeros(2), init=first, solver=solver)
    contracts.assert_close(again.value, least, 1e-6)


def test_where_rounding_stops_a_method_too_early_it_is_flagged():
    solution = minimize(raised, torch.zeros(2), solver=ScipyMinimize("CG"), on_failure="ignore")
    least = minimize(raised, torch.zeros(2), solver="newton").value
    assert (solution.value - least).norm() > 1e-6
    assert solution.status.item() == Status.STALLED


@pytest.mark.parametrize("solver", MINIMIZERS, ids=repr)
def test_minimizers_run_out_of_steps(solver):
    limited = type(solver)(solver.method, max_steps=5)
    solution = minimize(
        lambda z: rosenbrock(z).square().sum(), torch.tensor([-1.2, 1.0]), solver=limited, on_failure="ignore"
    )
    assert solution.status.item() == Status.MAX_STEPS
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("solver", MINIMIZERS, ids=repr)
@pytest.mark.parametrize("objective", [lambda z: z.sum(), lambda z: -(z**2).sum()], ids=["plane", "hill"])
def test_objectives_without_a_bottom_are_no_success(solver, objective):
    limited = type(solver)(solver.method, max_steps=60)
    solution = minimize(objective, torch.ones(2), solver=limited, on_failure="ignore")
    assert solution.status.item() != Status.SUCCESS
    if solver.method in ("BFGS", "TNC") and objective(torch.zeros(2)) < objective(torch.ones(2)):  # the plane
        assert solution.status.item() == Status.UNBOUNDED
        assert solution.value.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", MINIMIZERS + FITTERS, ids=repr)
def test_residuals_are_fitted_by_both(solver, dtype):
    t = torch.linspace(0, 1, 12, dtype=dtype)
    y = torch.stack([2 * torch.exp(-1.5 * t), torch.exp(-0.5 * t)]) + 0.01 * torch.cos(9 * t)
    z0 = torch.ones(2, 2, dtype=dtype)
    value = least_squares(curve, z0, (y, t), batch_dims=1, solver=solver).value
    assert value.dtype == dtype
    exact = least_squares(curve, z0.double(), (y.double(), t.double()), batch_dims=1).value
    contracts.assert_close(value.double(), exact, 1e-5 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("solver", FITTERS, ids=repr)
def test_fits_to_rounding_with_derivatives_of_second_order(solver):
    t = torch.linspace(0, 1, 5)
    y = 2 * torch.exp(-1.5 * t) + 0.1 * torch.randn(1, 5)
    solver = type(solver)(solver.method, 1e-12)

    def call(y):
        return least_squares(curve, torch.ones(1, 2), (y, t), batch_dims=1, solver=solver).value

    assert torch.autograd.gradcheck(call, contracts.wanting((y,)), check_forward_ad=True, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradgradcheck(call, contracts.wanting((y,)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("solver", FITTERS, ids=repr)
def test_roots_by_least_squares(solver):
    contracts.assert_close(root(rosenbrock, torch.tensor([-1.2, 1.0]), solver=solver).value, torch.ones(2))
    value = fixed_point(torch.cos, torch.ones(3, 1), batch_dims=1, solver=solver).value
    contracts.assert_close(value, torch.full((3, 1), 0.7390851332151607))
    solution = root(lambda z: z**2 + 1, torch.ones(1), solver=solver, on_failure="ignore")
    assert solution.status.item() == Status.STALLED


def test_failures_are_per_sample_and_leave_the_others_alone():
    center = torch.tensor([[1.0], [torch.nan], [3.0]], requires_grad=True)
    for solver in [ScipyMinimize(), ScipyLeastSquares()]:
        solution = least_squares(
            lambda z, c: z - c, torch.zeros(3, 1), (center,), batch_dims=1, solver=solver, on_failure="ignore"
        )
        assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
        (gradient,) = torch.autograd.grad(solution.value[solution.ok].sum(), center)
        assert gradient.flatten().tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("solver", [ScipyMinimize(rtol=1e-3), ScipyLeastSquares(rtol=1e-2)], ids=repr)
def test_a_loose_tolerance_is_met_by_less(solver):
    def call(solver):
        return least_squares(
            lambda z: torch.stack([z[0].cosh(), z[1].exp() - 2, z[0] - z[1]]), torch.ones(2), solver=solver
        )

    loose, tight = call(solver), call(type(solver)())
    assert 0 < loose.stats["steps"] < tight.stats["steps"]
    assert loose.stats["residual"] > tight.stats["residual"]


def test_a_routine_of_ones_own_sees_the_objective():
    seen = []

    def coordinate_search(residual, z):
        seen.append((residual.objective(z), residual(z), residual.jacobian(z)))
        for _ in range(30):
            for i in range(len(z)):

                def along(x, z=z, i=i):
                    return residual.objective(np.where(np.arange(len(z)) == i, x, z))

                z[i] = minimize_scalar(along, bracket=(z[i] - 1, z[i] + 1), tol=1e-10).x
        return z

    a = torch.tensor([1.0, 2.0])
    b = torch.tensor([1.0, -1.0], requires_grad=True)
    z = minimize(softly, torch.zeros(2), (a, b), solver=CallableSolver(coordinate_search)).value
    contracts.assert_close((torch.sinh(z) + a * z), b, 1e-6)
    contracts.assert_close(torch.autograd.grad(z.sum(), b)[0], 1 / (torch.cosh(z) + a))
    value, gradient, hessian = seen[0]
    assert value == 2.0
    np.testing.assert_allclose(gradient, [-1, 1])
    np.testing.assert_allclose(hessian, np.diag([2.0, 3.0]))


def test_a_routine_of_ones_own_sees_the_residuals():
    def gauss_newton(residual, z):
        assert residual.objective(z) == pytest.approx(residual.equations(z) @ residual.equations(z) / 2)
        for _ in range(50):
            value, jacobian = residual.linearization(z)
            np.testing.assert_allclose(jacobian.T @ value, residual(z), atol=1e-12)
            z = z - np.linalg.lstsq(jacobian, value, rcond=None)[0]
        return z

    t = torch.linspace(0, 1, 12)
    y = torch.exp(-t) + 0.01 * torch.randn(3, 12)
    call = {"batch_dims": 1, "args": (y, t)}
    ours = least_squares(curve, torch.ones(3, 2), solver=CallableSolver(gauss_newton), **call).value
    contracts.assert_close(ours, least_squares(curve, torch.ones(3, 2), **call).value, 1e-7)
    with pytest.raises(SolverError, match="STALLED"):
        least_squares(curve, torch.ones(3, 2), solver=CallableSolver(lambda residual, z: z), **call)


def test_one_point_is_evaluated_once():
    calls = []

    def objective(z):
        calls.append(1)
        return (z**2).sum() + z.sum()

    def ask(residual, z):
        del calls[:]
        residual(z), residual.objective(z), residual.objective(z.copy()), residual(z.copy())
        seen.append(len(calls))
        return z - 0.5

    seen = []
    minimize(objective, torch.zeros(2), solver=CallableSolver(ask))
    assert seen == [0]  # the start was evaluated before


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ScipyMinimize("bfgs"), UnknownNameError, "unknown method 'bfgs'"),
        (lambda: ScipyMinimize("Nelder-Meat"), UnknownNameError, "did you mean 'Nelder-Mead'"),
        (lambda: ScipyLeastSquares("trr"), UnknownNameError, "did you mean 'trf'"),
        (lambda: ScipyLeastSquares(loss="huber"), ProblemError, r"put the loss into the objective of minimize\(\)"),
        (lambda: least_squares(lambda z: z[:1], torch.ones(2), solver=ScipyLeastSquares("lm")), ProblemError,
         "lm needs as many residuals as unknowns, got 1 for 2; use method='trf'"),
        (lambda: root(lambda z: z, torch.ones(2), solver=ScipyMinimize()), TypeError,
         r"ScipyMinimize serves least_squares, minimize, not root; use Newton\(\)"),
        (lambda: fixed_point(torch.cos, torch.ones(2), solver="scipy_minimize"), TypeError, r"use Anderson\(\)"),
        (lambda: minimize(lambda z: z.sum(), torch.ones(2), solver="scipy_least_squares"), TypeError,
         r"use LBFGS\(\), Newton\(\) or ScipyMinimize\(\)"),
        (lambda: minimize(lambda z: z.sum(), torch.ones(2), solver=ScipyMinimize(), adjoint=UnrolledAdjoint()),
         TypeError, "use ImplicitAdjoint"),
        (lambda: minimize(lambda z: z.mean(dtype=torch.int64), torch.ones(2), solver=ScipyMinimize()), RuntimeError,
         "mean"),
    ],
)  # fmt: skip
def test_wrong_pairings_and_names(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_cobyqa_asks_for_the_scipy_that_has_it(monkeypatch):
    monkeypatch.setattr("difflayers.fixedpoint._scipy_minimize.version", lambda name: "1.10.1")
    with pytest.raises(ProblemError, match=r"COBYQA needs SciPy 1.14, this is 1.10.1; use COBYLA"):
        ScipyMinimize("COBYQA")


def test_exceptions_of_the_objective_are_the_users_to_see():
    calls = []

    def broken(z):
        calls.append(1)
        if len(calls) > 8:
            raise ValueError("mine")
        return (z**4).sum() + z.sum()

    for solver in (ScipyMinimize(), ScipyMinimize("Nelder-Mead")):
        del calls[:]
        with pytest.raises(ValueError, match="mine"):
            minimize(broken, torch.ones(2), solver=solver)
