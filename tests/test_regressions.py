"""What property tests found once."""

import numpy as np
import pytest
import torch

from difflayers import CallableSolver, ImplicitAdjoint, ImplicitFunction, RootProblem, Status
from difflayers.fixedpoint import MonotoneConvDEQ, MonotoneDEQ, least_squares, minimize
from difflayers.ode import odeint
from difflayers.qp import Cones, InteriorPoint, solve_cone, solve_qp


def test_gradients_of_least_squares_without_samples():
    a = torch.ones(2, requires_grad=True)
    for fn in (lambda z, a: torch.cat([z, a * z], -1), lambda z, a: [z, (a * z).sum(-1)]):
        least_squares(fn, torch.zeros(0, 2), (a,), batch_dims=1).value.sum().backward()
    assert not a.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_root_at_infinity_is_none(dtype):
    """1/z vanishes where z overflows, in the dtype of the unknown."""
    far = CallableSolver(lambda residual, z: np.full_like(z, np.inf if dtype == torch.float64 else 1e39))
    function = ImplicitFunction(RootProblem(lambda z: 1 / z), far, ImplicitAdjoint(), on_failure="ignore")
    solution = function.solve(init=torch.ones(1, dtype=dtype))
    assert solution.status == Status.NONFINITE
    assert solution.value.isnan().all()


@pytest.mark.parametrize(("layer", "shape"), [(MonotoneDEQ(3, 4), (3,)), (MonotoneConvDEQ(2, 3), (2, 4, 5))], ids=str)
def test_a_sick_input_leaves_the_weights_of_an_injection_alone(layer, shape):
    layer.on_failure = "ignore"
    layer.to(torch.float64)
    x = torch.randn(3, *shape)
    broken = x.clone()
    broken[1].reshape(-1)[0] = torch.nan
    gradients = []
    for batch in (broken, x[[0, 2]]):
        solution = layer.solve(batch)
        gradients.append(torch.autograd.grad(solution.value[solution.ok].square().sum(), list(layer.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_semidefinite_matrix_in_single_precision():
    """Its eigenvalues are as negative as rounding makes them; the derivative is that of the double one."""
    torch.manual_seed(3)
    roots = torch.randn(50, 5, 2)
    P, q = roots @ roots.mT, torch.randn(50, 5)
    assert (torch.linalg.eigvalsh(P.float().double())[:, 0] < -1e-9 * P.amax((1, 2))).any()
    bound = torch.ones(5)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = q.to(dtype).requires_grad_()
        x = solve_qp(P.float().to(dtype) + (dtype == torch.float64) * 1e-6 * torch.eye(5).to(dtype), leaf,
                     lb=-bound.to(dtype), ub=bound.to(dtype), on_failure="ignore")  # fmt: skip
        assert (x.status == Status.SUCCESS).all()
        x.x.sum().backward()
        assert leaf.grad.isfinite().all()
        found.append(x.x.detach().double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_gradients_in_single_precision_of_a_batch_that_was_not_verified_at_once():
    """The system of the adjoint is then factored again."""
    q = torch.tensor([[-3.0, -3.0], [torch.nan, 1.0]], dtype=torch.float32, requires_grad=True)
    P, G = torch.ones(2, 2, dtype=torch.float32), torch.tensor([[1.0, 0.5], [1.0, 0.5]], dtype=torch.float32)
    for solver in ("auto", InteriorPoint()):
        x = solve_qp(P, q, G, torch.ones(2, dtype=torch.float32), solver=solver, on_failure="ignore").x
        (gradient,) = torch.autograd.grad(x[0].sum(), q)
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_no_answer_is_nan_everywhere():
    eye = torch.eye(2)
    found = solve_qp(eye, torch.tensor([[1.0, 1.0], [torch.nan, 1.0]]), on_failure="ignore")
    assert found.z_box[1].isnan().all()
    assert not found.z_box[0].any()
    cone = solve_cone(eye, torch.tensor([torch.nan, 1.0]), eye, torch.ones(2), Cones(zero=2), on_failure="ignore")
    assert cone.s.isnan().all()


@pytest.mark.parametrize("solver", ["dopri5", "rodas"])
def test_a_huge_sample_does_not_loosen_the_tolerance_of_those_it_steps_with(solver):
    def grow(t, y):
        return 2.5 * y * (1 - y)

    y0, t = torch.tensor([[2e-3], [1e30]], dtype=torch.float32), torch.tensor([0.0, 2.0])
    solution = odeint(grow, y0, t, batch_dims=1, solver=solver, on_failure="ignore")
    grown = 2e-3 * np.exp(5) / (1 + 2e-3 * (np.exp(5) - 1))
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE]
    assert abs(solution.ys[-1, 0].item() - grown) < 1e-4


@pytest.mark.parametrize("guess", [1.0, 0.5])
def test_a_bound_that_an_equation_excludes_is_not_snapped_to(guess):
    """The least-squares solution of both leaves the bound alone, whose row is so much shorter."""
    A, ub = torch.tensor([[65536.0]]), torch.tensor([1.0])
    x = solve_qp(torch.eye(1), torch.tensor([-5.0]), A=A, b=A[0] / 2, ub=ub, init=torch.tensor([guess])).x
    assert x.item() == pytest.approx(0.5, abs=1e-12)


def test_an_answer_that_overflows_in_its_dtype_is_none():
    q = torch.tensor([[-1e10], [-1.0]], dtype=torch.float32, requires_grad=True)
    solution = solve_qp(torch.tensor([[1e-30]], dtype=torch.float32), q, on_failure="ignore")
    assert solution.status.tolist() == [Status.NONFINITE, Status.SUCCESS]
    assert solution.x[0].isnan()
    solution.x[solution.ok].sum().backward()
    assert q.grad[0] == 0
    assert q.grad[1].isfinite()


def test_a_sample_that_overflows_leaves_shared_gradients_alone():
    """Its row is finite, but powers of it aren't, and zero times infinity is NaN."""
    W = torch.ones(1, 1, dtype=torch.float32, requires_grad=True)
    x = torch.tensor([[0.2], [1e30], [-1.7]], dtype=torch.float32)
    found = minimize(lambda z, W, x: (z @ W - x).pow(4).sum(-1), torch.zeros_like(x), (W, x), batch_dims=1,
                     solver="lbfgs", on_failure="ignore")  # fmt: skip
    assert found.status[1] == Status.NONFINITE
    found.value[found.ok].sum().backward()
    assert W.grad.item() == pytest.approx(1.5, rel=0.1)  # -Σ x


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_a_cone_program_without_a_bound_by_rounding_says_so(solver):
    """Rounded, q isn't in the range of Cᵀ; what backends claim of that, nobody could prove at their accuracy."""
    torch.manual_seed(0)
    C = torch.randn(6, 3, 5, dtype=torch.float32)
    q = -C.mT @ torch.tensor([[2.0], [0.3], [-0.4]], dtype=torch.float32)
    found = solve_cone(None, q[..., 0], C, torch.randn(3).float(), Cones(second_order=(3,)), solver=solver,
                       on_failure="ignore")  # fmt: skip
    assert set(found.status.tolist()) <= {Status.SUCCESS, Status.UNBOUNDED}
    assert (found.status == Status.UNBOUNDED).any()


@pytest.mark.parametrize("falls", [1e-3, 1e-5, 1e-7])
def test_an_objective_that_falls_slowly_is_unbounded(falls):
    """Most of the slope is in the way of a row; along the row little is left of it, which is enough."""
    found = solve_qp(None, torch.tensor([1.0, falls]), -torch.eye(2)[:1], torch.zeros(1), on_failure="ignore")
    assert found.status == Status.UNBOUNDED
    assert found.stats["certificate"].tolist() == pytest.approx([0, -1, 0], abs=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cone_programs_that_differ_in_one_entry():
    """With older NumPy, Clarabel takes a pair of arrays of one entry for two numbers: ``make oldest`` failed."""
    C = torch.tensor([[-1.0, 0.5, 0.5], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]]).repeat(2, 1, 1)
    C[1, 0, 0] = -2.0
    q, d, cones = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 0.3, 0.2]), Cones(exponential=1)
    found = solve_cone(0.1 * torch.eye(3), q, C, d, cones)
    alone = torch.stack([solve_cone(0.1 * torch.eye(3), q, c, d, cones).x for c in C])
    torch.testing.assert_close(found.x, alone, rtol=1e-8, atol=1e-8)
