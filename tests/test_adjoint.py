"""Derivatives of every order and mode, over every solver and adjoint; and what can't be differentiated."""

import copy
import pickle

import contracts
import problems
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from difflayers import ImplicitAdjoint, ImplicitFunction, RootProblem, UnrolledAdjoint, linear, monitor
from difflayers.errors import ConvergenceWarning, LinearSolveError, ProblemError
from difflayers.fixedpoint import (
    Anderson,
    Broyden,
    Dogleg,
    FixedPointProblem,
    LevenbergMarquardt,
    Newton,
    Picard,
    ScipyRoot,
    fixed_point,
    root,
)

TIGHT = {"rtol": 1e-13, "atol": 1e-13}
SOLVERS = [
    Anderson(**TIGHT), Broyden(**TIGHT), Picard(**TIGHT), Newton(**TIGHT), Newton(**TIGHT, refactor=5),
    Dogleg(**TIGHT), LevenbergMarquardt(**TIGHT), ScipyRoot(rtol=1e-12),
]  # fmt: skip
ADJOINTS = [
    ImplicitAdjoint(linear.LU()),
    ImplicitAdjoint(linear.GMRES(rtol=1e-13)),
    ImplicitAdjoint(linear.GCR(rtol=1e-12)),
    ImplicitAdjoint(linear.BiCGSTAB(rtol=1e-12)),
    ImplicitAdjoint(linear.Anderson(rtol=1e-13)),
    ImplicitAdjoint(linear.Picard(rtol=1e-13)),
    ImplicitAdjoint(linear.LeastSquares()),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("case", problems.ZOO, ids=str)
def test_solution_and_derivatives(case, solver):
    contracts.check_solution(case, solver)
    contracts.check_gradients(case, solver, ImplicitAdjoint())


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_gradients_with_every_linear_solver(adjoint):
    contracts.check_gradients(problems.TANH, SOLVERS[0], adjoint)


@pytest.mark.parametrize(
    "solver", [Anderson(**TIGHT), Broyden(**TIGHT), Picard(**TIGHT, max_steps=60), Newton(**TIGHT)], ids=repr
)
def test_unrolled_gradients(solver):
    contracts.check_gradients(problems.TANH, solver, UnrolledAdjoint(), order=1, tolerance=1e-5)


@pytest.mark.parametrize("adjoint", [ADJOINTS[0], ADJOINTS[1]], ids=repr)
@pytest.mark.parametrize("case", problems.ZOO[:3], ids=str)
def test_transforms(case, adjoint):
    contracts.check_transforms(case, SOLVERS[0], adjoint)
    contracts.check_vmap(case, SOLVERS[0], adjoint)


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=repr)
def test_transforms_with_every_solver(solver):
    contracts.check_transforms(problems.TANH, solver, None)
    contracts.check_vmap(problems.TANH, solver, None)


@pytest.mark.parametrize("adjoint", [ADJOINTS[0], ADJOINTS[1]], ids=repr)
def test_third_order(adjoint):
    contracts.check_third_order(problems.TANH, SOLVERS[0], adjoint)


def test_per_sample_gradients():
    weight, x = problems.TANH.params()

    def loss(weight, row):
        z = fixed_point(problems.tanh_cell, torch.zeros(4), (weight, row), solver=SOLVERS[0]).value
        return z.pow(2).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for row, gradient in zip(x, each, strict=True):
        contracts.assert_close(gradient, torch.func.grad(loss)(weight, row))


def test_forward_over_reverse_in_eager_mode():
    weight, x = problems.TANH.params()

    def moved(fn):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight.clone().requires_grad_(), weight**2)
            (gradient,) = torch.autograd.grad(fn(dual, x).pow(3).sum(), dual, create_graph=True)
            return forward_ad.unpack_dual(gradient).tangent

    contracts.assert_close(moved(contracts.layer(problems.TANH, SOLVERS[0])), moved(problems.TANH.answer))


def test_reverse_over_forward_in_eager_mode():
    weight, x = problems.TANH.params()

    def pulled(fn):
        leaf = weight.clone().requires_grad_()
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(fn(forward_ad.make_dual(leaf, weight**2), x).pow(3).sum()).tangent
            return torch.autograd.grad(moved, leaf)

    contracts.assert_close(pulled(contracts.layer(problems.TANH, SOLVERS[0])), pulled(problems.TANH.answer))


def test_vjp_and_jvp_without_autograd():
    weight, x = problems.TANH.params()
    fn = ImplicitFunction(FixedPointProblem(problems.tanh_cell, 1), SOLVERS[0])
    solution = fn.solve(weight, x, init=torch.zeros(3, 4))
    cotangent = torch.randn(3, 4)
    expected, pullback = torch.func.vjp(problems.TANH.answer, weight, x)
    contracts.assert_close(fn.vjp((weight, x), solution, cotangent), pullback(cotangent))
    _, moved = torch.func.jvp(lambda x: problems.TANH.answer(weight, x), (x,), (x,))
    contracts.assert_close(fn.jvp((weight, x), solution, (None, x)), moved)
    contracts.assert_close(solution.value, expected)
    assert not solution.value.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around(reentrant):
    params = contracts.wanting(problems.TANH.params())
    call = contracts.layer(problems.TANH, SOLVERS[0])
    plain = torch.autograd.grad(call(*params).pow(2).sum(), params)
    around = checkpoint(call, *params, use_reentrant=reentrant).pow(2).sum()
    around.backward()
    contracts.assert_close([p.grad for p in params], plain)


def test_checkpoint_inside():
    params = contracts.wanting(problems.TANH.params())

    def inside(z, weight, x):
        return checkpoint(problems.tanh_cell, z, weight, x, use_reentrant=False)

    z = fixed_point(inside, torch.zeros(3, 4), params, batch_dims=1, solver=SOLVERS[0]).value
    expected = torch.autograd.grad(problems.TANH.answer(*params).pow(2).sum(), params)
    contracts.assert_close(torch.autograd.grad(z.pow(2).sum(), params), expected)


def test_closures_get_first_derivatives_only():
    weight, x = contracts.wanting(problems.TANH.params())
    hidden = weight * 1.0  # not a leaf: the gradient has to travel on
    z = fixed_point(
        lambda z, x: problems.tanh_cell(z, hidden, x), torch.zeros(3, 4), (x,), batch_dims=1, solver=SOLVERS[0]
    )
    loss = z.value.pow(3).sum()
    expected = torch.autograd.grad(problems.TANH.answer(weight, x).pow(3).sum(), (weight, x))
    contracts.assert_close(torch.autograd.grad(loss, (weight, x), retain_graph=True), expected)
    with pytest.raises(ProblemError, match=r"closes over 'hidden'.*first derivatives only"):
        torch.autograd.grad(loss, (weight, x), create_graph=True)
    with pytest.raises(ProblemError, match="closes over 'hidden'"):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd], ids=["grad", "jacfwd"])
def test_closures_over_tracked_tensors_are_refused(transform):
    with pytest.raises(ProblemError, match="closes over 'a'"):
        transform(lambda a: fixed_point(lambda z: 0.5 * z + a, torch.zeros(2)).value.sum())(torch.ones(2))


def test_closure_over_vmapped_tensor_is_refused():
    with pytest.raises(ProblemError, match="closes over 'a'"):
        torch.func.vmap(lambda a: fixed_point(lambda z: 0.5 * z + a, torch.zeros(2)).value)(torch.ones(3, 2))


def test_unbatched_parameters_are_summed_over_the_batch():
    weight, x = problems.TANH.params()
    shared = weight.clone().requires_grad_()
    contracts.layer(problems.TANH, SOLVERS[0])(shared, x).sum().backward()
    each = weight.expand(3, 4, 4).clone().requires_grad_()
    solution = fixed_point(
        lambda z, w, x: torch.tanh((w @ z.unsqueeze(-1)).squeeze(-1) + x),
        torch.zeros(3, 4), (each, x), batch_dims=1, solver=SOLVERS[0],
    )  # fmt: skip
    solution.value.sum().backward()
    contracts.assert_close(shared.grad, each.grad.sum(0))


def test_ignored_parameter_has_no_gradient():
    a, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    root(lambda z, a, unused: z - a, torch.zeros(2), (a, unused)).value.sum().backward()
    contracts.assert_close(a.grad, torch.ones(2))
    assert unused.grad is None or not unused.grad.any()


def test_nonfinite_sample_leaves_the_others_alone():
    weight, x = problems.TANH.params()
    broken = x.clone()
    broken[1, 2] = torch.nan
    for hide_input in (False, True):  # as a parameter, and closed over

        def run(weight, x, hide_input=hide_input):
            fn = (lambda z, w: problems.tanh_cell(z, w, x)) if hide_input else problems.tanh_cell
            args = (weight,) if hide_input else (weight, x)
            return fixed_point(fn, torch.zeros(x.shape), args, batch_dims=1, solver=SOLVERS[0], on_failure="ignore")

        one, two = contracts.wanting((weight, weight))
        solution, healthy = run(one, broken), run(two, x[[0, 2]])
        assert solution.status.tolist() == [0, 3, 0]
        assert solution.value[1].isnan().all()
        contracts.assert_close(solution.value[[0, 2]], healthy.value, 1e-14)
        solution.value[solution.ok].pow(2).sum().backward()
        healthy.value.pow(2).sum().backward()
        contracts.assert_close(one.grad, two.grad, 1e-12)


def test_failed_sample_contributes_exactly_zero():
    x = torch.tensor([[1.0], [0.0], [2.0]], requires_grad=True)  # log(0): the sample's own derivative is 0 · inf
    scale = torch.tensor(0.1, requires_grad=True)
    solution = fixed_point(
        lambda z, s, x: s * z * torch.log(x) + 1, torch.zeros(3, 1), (scale, x), batch_dims=1, on_failure="ignore"
    )
    assert solution.status.tolist() == [0, 3, 0]
    solution.value[solution.ok].sum().backward()
    assert x.grad[1].item() == 0
    assert x.grad.isfinite().all()
    assert scale.grad.isfinite()


def test_singular_adjoint_is_named():
    a = torch.tensor([0.0, 1.0], requires_grad=True)  # z^3 = a has an infinite slope at 0
    solution = root(
        lambda z, a: z**3 - a, torch.tensor([0.0, 1.0]), (a,), batch_dims=1,
        adjoint=ImplicitAdjoint(linear.LU()), solver=Picard(),
    )  # fmt: skip
    with pytest.raises(LinearSolveError, match=r"SINGULAR in 1 of 2 samples \(0\)"):
        solution.value.sum().backward()
    solution = root(
        lambda z, a: z**3 - a, torch.tensor([0.0, 1.0]), (a,), batch_dims=1, solver=Picard(), on_failure="warn"
    )
    with pytest.warns(ConvergenceWarning, match="SINGULAR"):
        (gradient,) = torch.autograd.grad(solution.value.sum(), a)
    contracts.assert_close(gradient, torch.tensor([0.0, 1 / 3]))


def test_approximate_gradients_are_first_order_and_approximate():
    params = contracts.wanting(problems.TANH.params())
    exact = torch.autograd.grad(problems.TANH.answer(*params).sum(), params[0])[0]
    errors = []
    for solver in (linear.Identity(), linear.Neumann(2), linear.Neumann(8)):
        z = contracts.layer(problems.TANH, SOLVERS[0], ImplicitAdjoint(solver))(*params)
        (gradient,) = torch.autograd.grad(z.sum(), params[0], retain_graph=True)
        errors.append((gradient - exact).norm().item())
        with pytest.raises(ProblemError, match="no second ones"):
            torch.autograd.grad(z.sum(), params, create_graph=True)
    assert errors[0] > errors[1] > errors[2] > 0


def test_adjoint_that_cannot_serve_is_refused_at_construction():
    with pytest.raises(TypeError, match="Neumann needs a Jacobian that is fixed_point"):
        ImplicitFunction(RootProblem(lambda z: z), Newton(), ImplicitAdjoint(linear.Neumann()))
    with pytest.raises(TypeError, match="outside autograd"):
        ImplicitFunction(RootProblem(lambda z: z), ScipyRoot(), UnrolledAdjoint())


def test_saved_memory_does_not_grow_with_iterations():
    weight, x = contracts.wanting(problems.TANH.params())

    def saved(steps, adjoint):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        never = Picard(rtol=0.0, atol=0.0, max_steps=steps, damping=0.001, patience=steps + 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            solution = fixed_point(
                problems.tanh_cell, torch.zeros(3, 4), (weight, x), batch_dims=1, solver=never, adjoint=adjoint,
                on_failure="ignore",
            )  # fmt: skip
        assert solution.stats["steps"].tolist() == [steps] * 3
        return sum(sizes.values())

    assert saved(10, None) == saved(10_000, None)
    assert saved(50, UnrolledAdjoint()) > 3 * saved(10, UnrolledAdjoint())


def test_autocast_is_entered_again_in_backward():
    seen = []

    def fn(z, weight, x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.tanh(z @ weight.mT + x)

    weight, x = (p.float().requires_grad_() for p in problems.TANH.params())
    loose = Anderson(rtol=2e-2, atol=1e-2)
    adjoint = ImplicitAdjoint(linear.GMRES(rtol=1e-2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = fixed_point(
            fn, torch.zeros(3, 4, dtype=torch.float32), (weight, x), batch_dims=1, solver=loose, adjoint=adjoint
        )
    z.value.sum().backward()
    assert all(seen[1:])
    assert z.value.dtype == weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(problems.TANH.answer(weight.double(), x.double()).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, exact.float(), rtol=0.1, atol=0.05)


def test_monitor_sees_forward_and_backward():
    params = contracts.wanting(problems.TANH.params())
    with monitor() as log:
        contracts.layer(problems.TANH, SOLVERS[0])(*params).sum().backward()
    assert [record.role for record in log] == ["forward", "adjoint"]
    assert log[0].samples == 3
    assert log[0].status == {"SUCCESS": 3}
    assert log[0].steps >= 3
    assert log[0].residual < 1e-12
    contracts.layer(problems.TANH, SOLVERS[0])(*params)
    assert len(log) == 2


def test_linearizes_once_per_adjoint_solve():
    calls = []

    def counted(z, weight, x):
        calls.append(torch.is_grad_enabled())
        return problems.tanh_cell(z, weight, x)

    params = contracts.wanting(problems.TANH.params())
    adjoint = ImplicitAdjoint(linear.GMRES())
    z = fixed_point(counted, torch.zeros(3, 4), params, batch_dims=1, solver=SOLVERS[0], adjoint=adjoint).value
    calls.clear()
    z.sum().backward()
    assert len(calls) == 1  # for the system and the parameters together


def test_function_survives_deepcopy_and_pickle():
    fn = ImplicitFunction(FixedPointProblem(problems.tanh_cell, 1), SOLVERS[0])
    weight, x = problems.TANH.params()
    expected = fn(weight, x, init=torch.zeros(3, 4)).value
    for other in (copy.deepcopy(fn), pickle.loads(pickle.dumps(fn))):
        contracts.assert_close(other(weight, x, init=torch.zeros(3, 4)).value, expected)


def test_closure_over_eager_dual_is_refused():
    with forward_ad.dual_level():
        a = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(ProblemError, match="forward mode"):
            fixed_point(lambda z: 0.5 * z + a, torch.zeros(2))


def test_constants_are_no_closures():
    half = torch.full((2,), 0.5)

    def loss(a):
        return fixed_point(lambda z, a: half * z + a, torch.zeros(2), (a,)).value.sum()

    a = torch.ones(2)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        contracts.assert_close(transform(loss)(a), torch.full((2,), 2.0))

        def inside(a):  # made below the transform, and so out of the solve's reach
            constant = torch.full((2,), 0.5)
            return fixed_point(lambda z, a: constant * z + a, torch.zeros(2), (a,)).value.sum()

        with pytest.raises(ProblemError, match="closes over 'constant'"):
            transform(inside)(a)
    contracts.assert_close(torch.func.vmap(loss)(a.expand(3, 2)), torch.full((3,), 4.0))


@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=repr)
def test_vectorized_eager_jacobian_and_hessian(adjoint):
    params = problems.TANH.params()
    ours = contracts.layer(problems.TANH, SOLVERS[0], adjoint)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    contracts.assert_close(jacobian(ours, params, vectorize=True), jacobian(problems.TANH.answer, params))
    contracts.assert_close(
        hessian(contracts.cubed(ours), params, vectorize=True), hessian(contracts.cubed(problems.TANH.answer), params)
    )


def test_vectorized_jacobian_with_ignored_parameter():
    def call(a, unused):
        return root(lambda z, a, unused: z - 2 * a, torch.zeros(2), (a, unused)).value

    ours = torch.autograd.functional.jacobian(call, (torch.ones(2), torch.ones(2)), vectorize=True)
    contracts.assert_close(ours, (2 * torch.eye(2), torch.zeros(2, 2)))
