"""Every promise, over every solver and adjoint."""

import dataclasses

import contracts
import problems
import pytest
import torch
from contracts import ADJOINTS, PAIRS, SOLVERS, TIGHT, label

from difflayers import ImplicitAdjoint, ImplicitFunction, RootProblem, UnrolledAdjoint, available_solvers, linear
from difflayers.errors import ProblemError
from difflayers.fixedpoint import (
    LBFGS,
    Anderson,
    Broyden,
    FixedPointProblem,
    MinimizeProblem,
    Newton,
    Picard,
    fixed_point,
    minimize,
)

UNROLLED = [Anderson(**TIGHT), Broyden(**TIGHT), Picard(**TIGHT, max_steps=80), Newton(**TIGHT)]
every_pair = pytest.mark.parametrize(("solver", "adjoint"), PAIRS, ids=label)


def test_nobody_is_left_out():
    named = {solver for solver in available_solvers("fixedpoint").values() if "fixed_point" in solver.serves}
    assert named <= {type(solver) for solver in SOLVERS}
    public = [getattr(linear, name) for name in linear.__all__]
    bases = {linear.LinearSolver, linear.IterativeLinearSolver}
    exact = {cls for cls in public if getattr(cls, "exact", False)} - bases
    here = {type(adjoint.linear_solver) for _, adjoint in PAIRS}
    assert exact - here == {linear.CG}  # has a test of its own


@pytest.mark.parametrize("solver", SOLVERS, ids=label)
@pytest.mark.parametrize("case", problems.ZOO, ids=str)
def test_solution_and_derivatives(case, solver):
    contracts.check_solution(case, solver)
    contracts.check_gradients(case, solver, ImplicitAdjoint())


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=label)
def test_gradients_with_every_linear_solver(adjoint):
    contracts.check_gradients(problems.TANH, SOLVERS[0], adjoint)


@every_pair
def test_transforms(solver, adjoint):
    contracts.check_transforms(problems.TANH, solver, adjoint)
    contracts.check_vmap(problems.TANH, solver, adjoint)


@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=label)
@pytest.mark.parametrize("case", problems.ZOO[1:3], ids=str)
def test_transforms_of_other_cases(case, adjoint):
    contracts.check_transforms(case, SOLVERS[0], adjoint)
    contracts.check_vmap(case, SOLVERS[0], adjoint)


@every_pair
def test_third_order(solver, adjoint):
    contracts.check_third_order(problems.TANH, solver, adjoint)


@every_pair
def test_forward_and_reverse_in_eager_mode(solver, adjoint):
    contracts.check_eager_forward_and_reverse(problems.TANH, solver, adjoint)


@every_pair
def test_checkpointing(solver, adjoint):
    contracts.check_checkpointing(problems.TANH, solver, adjoint)


@every_pair
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_sample_leaves_the_others_alone(solver, adjoint, bad):
    contracts.check_bad_sample(solver, adjoint, bad)


@every_pair
def test_zero_size_batch(solver, adjoint):
    contracts.check_zero_size_batch(solver, adjoint)


@every_pair
def test_copies(solver, adjoint):
    contracts.check_copies(problems.TANH, solver, adjoint)


@every_pair
def test_ignored_parameters(solver, adjoint):
    contracts.check_ignored_parameters(solver, adjoint)


@pytest.mark.parametrize("linear_solver", [linear.CG(rtol=1e-13), linear.Auto(rtol=1e-13, dense_size=0)], ids=label)
def test_conjugate_gradients_serve_definite_jacobians(linear_solver):
    def residual(z, matrix, b):  # the gradient of a convex function
        return z + z**3 / 3 + matrix.mT @ (matrix @ z) - b

    known = frozenset({"symmetric", "positive_definite"})
    adjoint = ImplicitAdjoint(linear_solver)
    fn = ImplicitFunction(RootProblem(residual, properties=known), Newton(**TIGHT), adjoint)
    params = contracts.wanting((0.5 * torch.randn(3, 3), torch.randn(3)))

    def call(*params):
        return fn(*params, init=torch.zeros(3)).value

    assert torch.autograd.gradcheck(call, params, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, params)


def test_no_solver_that_can_be_unrolled_is_left_out():
    named = {solver for solver in available_solvers("fixedpoint").values() if solver.traceable}
    assert named == {type(solver) for solver in UNROLLED}


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.traceable] + [LBFGS()], ids=label)
def test_what_cannot_be_unrolled_is_refused(solver):
    problem = MinimizeProblem if isinstance(solver, LBFGS) else FixedPointProblem
    with pytest.raises(TypeError, match=f"{type(solver).__name__} takes steps outside autograd"):
        ImplicitFunction(problem(torch.cos), solver, UnrolledAdjoint())


@pytest.mark.parametrize("steps", [1, 2, 4, 60])
@pytest.mark.parametrize("solver", UNROLLED, ids=label)
@pytest.mark.parametrize("case", [problems.AFFINE, problems.HERON], ids=str)
def test_unrolled_gradients_are_those_of_the_iterate(case, solver, steps):
    solver = dataclasses.replace(solver, max_steps=steps)  # 60: samples that are done wait for the others

    def call(*params):
        z0 = torch.full(case.shape, 0.8)
        options = {"batch_dims": case.batch_dims, "solver": solver, "on_failure": "ignore"}
        return fixed_point(case.fn, z0, params, adjoint=UnrolledAdjoint(), **options).value

    assert torch.autograd.gradcheck(call, contracts.wanting(case.params()))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_unrolled_minima_of_newton_are_those_of_the_iterate(steps):
    def call(a):
        options = {"batch_dims": 1, "solver": Newton(max_steps=steps), "on_failure": "ignore"}
        fn = lambda z, a: (z.exp() - a * z).sum(-1) + (z[..., 0] - z[..., 1]) ** 4  # noqa: E731
        return minimize(fn, torch.tensor([[2.0, 1.0]]), (a,), adjoint=UnrolledAdjoint(), **options).value

    assert torch.autograd.gradcheck(call, torch.tensor([[1.0, 3.0]], requires_grad=True))


@pytest.mark.parametrize("solver", UNROLLED, ids=label)
def test_unrolled_gradients(solver):
    contracts.check_gradients(problems.TANH, solver, UnrolledAdjoint(), tolerance=1e-5)


@pytest.mark.parametrize("solver", UNROLLED, ids=label)
def test_unrolled_higher_orders(solver):
    contracts.check_transforms(problems.TANH, solver, UnrolledAdjoint())
    contracts.check_third_order(problems.TANH, solver, UnrolledAdjoint())
    contracts.check_eager_forward_and_reverse(problems.TANH, solver, UnrolledAdjoint())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard(), Newton()], ids=label)
def test_unrolled_with_a_bad_sample(solver, bad):
    contracts.check_bad_sample(solver, UnrolledAdjoint(), bad)


def test_unrolled_under_vmap_is_refused():
    def call(x):
        return fixed_point(lambda z, x: 0.5 * torch.cos(z) + x, torch.zeros(2), (x,), adjoint=UnrolledAdjoint()).value

    with pytest.raises(ProblemError, match=r"can't be vmapped.*batch_dims=1"):
        torch.func.vmap(call)(torch.ones(3, 2))
