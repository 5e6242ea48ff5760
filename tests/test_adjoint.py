"""Derivatives in special circumstances, and what can't be differentiated. The grids are in test_promises.py."""

import contracts
import problems
import pytest
import torch
from torch.autograd import forward_ad

from difflayers import ImplicitAdjoint, ImplicitFunction, RootProblem, UnrolledAdjoint, linear, monitor
from difflayers.errors import ConvergenceWarning, LinearSolveError, ProblemError
from difflayers.fixedpoint import (
    Anderson,
    FixedPointProblem,
    Newton,
    Picard,
    ScipyRoot,
    fixed_point,
    root,
)

SOLVER = contracts.SOLVERS[0]


def test_per_sample_gradients():
    weight, x = problems.TANH.params()

    def loss(weight, row):
        z = fixed_point(problems.tanh_cell, torch.zeros(4), (weight, row), solver=SOLVER).value
        return z.pow(2).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for row, gradient in zip(x, each, strict=True):
        contracts.assert_close(gradient, torch.func.grad(loss)(weight, row))


def test_vjp_and_jvp_without_autograd():
    weight, x = problems.TANH.params()
    fn = ImplicitFunction(FixedPointProblem(problems.tanh_cell, 1), SOLVER)
    solution = fn.solve(weight, x, init=torch.zeros(3, 4))
    cotangent = torch.randn(3, 4)
    expected, pullback = torch.func.vjp(problems.TANH.answer, weight, x)
    contracts.assert_close(fn.vjp((weight, x), solution, cotangent), pullback(cotangent))
    _, moved = torch.func.jvp(lambda x: problems.TANH.answer(weight, x), (x,), (x,))
    contracts.assert_close(fn.jvp((weight, x), solution, (None, x)), moved)
    contracts.assert_close(solution.value, expected)
    assert not solution.value.requires_grad


def test_closures_get_first_derivatives_only():
    weight, x = contracts.wanting(problems.TANH.params())
    hidden = weight * 1.0  # not a leaf: the gradient has to travel on
    z = fixed_point(lambda z, x: problems.tanh_cell(z, hidden, x), torch.zeros(3, 4), (x,), batch_dims=1, solver=SOLVER)
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
    contracts.layer(problems.TANH, SOLVER)(shared, x).sum().backward()
    each = weight.expand(3, 4, 4).clone().requires_grad_()
    solution = fixed_point(
        lambda z, w, x: torch.tanh((w @ z.unsqueeze(-1)).squeeze(-1) + x),
        torch.zeros(3, 4), (each, x), batch_dims=1, solver=SOLVER,
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
            return fixed_point(fn, torch.zeros(x.shape), args, batch_dims=1, solver=SOLVER, on_failure="ignore")

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
        z = contracts.layer(problems.TANH, SOLVER, ImplicitAdjoint(solver))(*params)
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
        contracts.layer(problems.TANH, SOLVER)(*params).sum().backward()
    assert [record.role for record in log] == ["forward", "adjoint"]
    assert log[0].samples == 3
    assert log[0].status == {"SUCCESS": 3}
    assert log[0].steps >= 3
    assert log[0].residual < 1e-12
    contracts.layer(problems.TANH, SOLVER)(*params)
    assert len(log) == 2


def test_linearizes_once_per_adjoint_solve():
    calls = []

    def counted(z, weight, x):
        calls.append(torch.is_grad_enabled())
        return problems.tanh_cell(z, weight, x)

    params = contracts.wanting(problems.TANH.params())
    adjoint = ImplicitAdjoint(linear.GMRES())
    z = fixed_point(counted, torch.zeros(3, 4), params, batch_dims=1, solver=SOLVER, adjoint=adjoint).value
    calls.clear()
    z.sum().backward()
    assert len(calls) == 1  # for the system and the parameters together


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


@pytest.mark.parametrize("adjoint", contracts.ADJOINTS[:2], ids=repr)
def test_vectorized_eager_jacobian_and_hessian(adjoint):
    params = problems.TANH.params()
    ours = contracts.layer(problems.TANH, SOLVER, adjoint)
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


@contracts.compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_function_equals_eager():
    params = contracts.wanting(problems.TANH.params())
    solve = contracts.layer(problems.TANH, SOLVER)

    def model(weight, x):
        return torch.sin(solve(weight, 2 * x)).pow(2).sum()

    compiled = torch.compile(model, backend="aot_eager")
    contracts.assert_close(compiled(*params), model(*params), 1e-12)
    ours, eager = (torch.autograd.grad(fn(*params), params) for fn in (compiled, model))
    contracts.assert_close(ours, eager, 1e-12)
