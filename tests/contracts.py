"""What every solver and adjoint promises, one function a promise; and who promises it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from difflayers import CallableSolver, ImplicitAdjoint, ImplicitFunction, linear
from difflayers.fixedpoint import (
    Anderson,
    Broyden,
    Dogleg,
    FixedPointProblem,
    LevenbergMarquardt,
    Newton,
    Picard,
    ScipyLeastSquares,
    ScipyRoot,
    fixed_point,
)

compiles = pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.13"),
    reason="torch.compile of 2.6 and 2.8 breaks on what is compiled here, 2.13 doesn't",
)


def newton_in_numpy(residual, z):
    """Somebody's own routine."""
    for _ in range(50):
        step = np.linalg.solve(residual.jacobian(z), residual(z).ravel()).reshape(z.shape)
        z = z - step
        if np.linalg.norm(step) <= 1e-14 * np.linalg.norm(z):
            break
    return z


TIGHT = {"rtol": 1e-13, "atol": 1e-13}
SOLVERS = [
    Anderson(**TIGHT), Broyden(**TIGHT), Picard(**TIGHT), Newton(**TIGHT), Newton(**TIGHT, refactor=5),
    Dogleg(**TIGHT), LevenbergMarquardt(**TIGHT),
    ScipyRoot(rtol=1e-12), ScipyLeastSquares(rtol=1e-13), CallableSolver(newton_in_numpy),
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
# Every solver with the default adjoint, and every adjoint with one solver.
PAIRS = [*[(solver, ImplicitAdjoint()) for solver in SOLVERS], *[(SOLVERS[0], adjoint) for adjoint in ADJOINTS]]


def label(value):
    """The same in every process, unlike the address of a function."""
    return repr(value).split(" at 0x")[0]


def layer(case, solver, adjoint=None):
    """The answer of ``case`` as a function of its parameters."""

    def call(*params):
        z0 = torch.zeros(case.shape) + (1.0 if case.name == "heron" else 0.0)
        return fixed_point(case.fn, z0, params, batch_dims=case.batch_dims, solver=solver, adjoint=adjoint).value

    return call


def wanting(params):
    return tuple(p.clone().requires_grad_() for p in params)


def assert_close(actual, expected, tolerance=1e-8):
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def check_solution(case, solver):
    params = case.params()
    value = layer(case, solver)(*params)
    assert value.dtype == torch.float64
    assert_close(value, case.answer(*params))


def check_gradients(case, solver, adjoint, order=2, tolerance=1e-6):
    """First (and second) derivatives against finite differences, reverse and forward, and against the closed form."""
    params = wanting(case.params())
    call = layer(case, solver, adjoint)
    assert torch.autograd.gradcheck(call, params, check_forward_ad=True, check_batched_grad=True)
    if order > 1:
        # Along one random direction: every column would be most of the time of all tests.
        assert torch.autograd.gradgradcheck(call, params, fast_mode=True, check_batched_grad=True)
    ours = torch.autograd.grad(call(*params).pow(3).sum(), params)
    closed = torch.autograd.grad(case.answer(*params).pow(3).sum(), params)
    assert_close(ours, closed, tolerance)


def cubed(fn):
    return lambda *params: fn(*params).pow(3).sum()


def check_transforms(case, solver, adjoint):
    """``torch.func`` agrees with the closed form, in every mode and to second order."""
    params = case.params()
    every = tuple(range(len(params)))
    ours, closed = layer(case, solver, adjoint), case.answer
    assert_close(grad(cubed(ours), every)(*params), grad(cubed(closed), every)(*params))
    assert_close(jvp(ours, params, params), jvp(closed, params, params))
    assert_close(jacrev(ours, every)(*params), jacrev(closed, every)(*params))
    assert_close(jacfwd(ours, every)(*params), jacfwd(closed, every)(*params))
    expected = hessian(cubed(closed), every)(*params)
    assert_close(hessian(cubed(ours), every)(*params), expected)
    assert_close(jacrev(jacrev(cubed(ours), every), every)(*params), expected)
    assert_close(jacfwd(jacfwd(cubed(ours), every), every)(*params), expected)
    assert_close(jacrev(jacfwd(cubed(ours), every), every)(*params), expected)


def check_vmap(case, solver, adjoint):
    """vmap, nested vmap, and per-sample gradients under it."""
    first, *rest = case.params()
    stacked = torch.stack([first, first * 0.9])
    dims = (0, *[None] * len(rest))
    ours, closed = layer(case, solver, adjoint), case.answer
    assert_close(vmap(ours, dims)(stacked, *rest), vmap(closed, dims)(stacked, *rest))
    nested = stacked.unsqueeze(1)
    assert_close(vmap(vmap(ours, dims), dims)(nested, *rest), vmap(vmap(closed, dims), dims)(nested, *rest))
    assert_close(vmap(grad(cubed(ours)), dims)(stacked, *rest), vmap(grad(cubed(closed)), dims)(stacked, *rest))


def check_third_order(case, solver, adjoint):
    """Reverse over reverse over reverse, against the traced route."""
    direction = case.params()[0]

    def third(fn):
        params = wanting(case.params())
        (first,) = torch.autograd.grad(fn(*params).pow(3).sum(), params[0], create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), params[-1], create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), params)

    assert_close(third(layer(case, solver, adjoint)), third(case.answer), 1e-7)


def check_eager_forward_and_reverse(case, solver, adjoint):
    """Dual numbers through a backward pass, and a backward pass through dual numbers."""
    first, *rest = case.params()

    def forward_over_reverse(fn):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(first.clone().requires_grad_(), first**2)
            (gradient,) = torch.autograd.grad(fn(dual, *rest).pow(3).sum(), dual, create_graph=True)
            return forward_ad.unpack_dual(gradient).tangent

    def reverse_over_forward(fn):
        leaf = first.clone().requires_grad_()
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(fn(forward_ad.make_dual(leaf, first**2), *rest).pow(3).sum()).tangent
            return torch.autograd.grad(moved, leaf)

    ours = layer(case, solver, adjoint)
    assert_close(forward_over_reverse(ours), forward_over_reverse(case.answer))
    assert_close(reverse_over_forward(ours), reverse_over_forward(case.answer))


def check_checkpointing(case, solver, adjoint):
    """Around the solve, both of torch's kinds, and inside the function."""
    params, call = wanting(case.params()), layer(case, solver, adjoint)
    expected = torch.autograd.grad(case.answer(*params).pow(2).sum(), params)
    for reentrant in (True, False):
        leaves = wanting(case.params())
        checkpoint(call, *leaves, use_reentrant=reentrant).pow(2).sum().backward()
        assert_close([leaf.grad for leaf in leaves], expected)

    def inside(z, *params):
        return checkpoint(case.fn, z, *params, use_reentrant=False)

    value = fixed_point(inside, case.z0(), params, batch_dims=case.batch_dims, solver=solver, adjoint=adjoint).value
    assert_close(torch.autograd.grad(value.pow(2).sum(), params), expected)


def check_bad_sample(solver, adjoint, bad):
    """NaN or infinity in one sample: the others are what they are without it, in value and in gradient."""

    def fn(z, weight, x):
        return 0.3 * torch.tanh(z @ weight.mT) + x

    weight, x = torch.randn(4, 4), torch.randn(3, 4)
    broken = x.clone()
    broken[1, 2] = bad

    def run(x, weight):
        z0 = torch.zeros(x.shape)
        args = (weight, x)
        return fixed_point(fn, z0, args, batch_dims=1, solver=solver, adjoint=adjoint, on_failure="ignore")

    one, two = wanting((weight, weight))
    solution, healthy = run(broken, one), run(x[[0, 2]], two)
    assert solution.status.tolist() == [0, 3, 0]
    assert solution.value[1].isnan().all()
    assert_close(solution.value[[0, 2]], healthy.value, 1e-14)
    solution.value[solution.ok].pow(2).sum().backward()
    healthy.value.pow(2).sum().backward()
    assert_close(one.grad, two.grad, 1e-12)


def check_zero_size_batch(solver, adjoint):
    """No samples: an empty answer, a zero gradient; under vmap too."""
    weight = torch.randn(4, 4, requires_grad=True)

    def call(x):
        args = (weight.detach(), x)
        return fixed_point(lambda z, w, x: z @ w.mT + x, torch.zeros(4), args, solver=solver, adjoint=adjoint).value

    value = fixed_point(
        lambda z, w: z @ w.mT, torch.zeros(0, 4), (weight,), batch_dims=1, solver=solver, adjoint=adjoint
    ).value
    value.sum().backward()
    assert value.shape == vmap(call)(torch.zeros(0, 4)).shape == (0, 4)
    assert not weight.grad.any()


def check_copies(case, solver, adjoint):
    """Deep copies and pickles give the same answer, to the last bit."""
    fn, params = ImplicitFunction(FixedPointProblem(case.fn, case.batch_dims), solver, adjoint), case.params()
    expected = fn(*params, init=case.z0()).value
    for other in (copy.deepcopy(fn), pickle.loads(pickle.dumps(fn))):
        assert torch.equal(other(*params, init=case.z0()).value, expected)


def check_ignored_parameters(solver, adjoint):
    """A function that ignores its parameters has an answer, which doesn't depend on them."""

    def call(a):
        fn = lambda z, a: 0.5 * torch.cos(z)  # noqa: E731
        return fixed_point(fn, torch.zeros(2), (a,), solver=solver, adjoint=adjoint).value

    a = torch.ones(2, requires_grad=True)
    value = call(a)
    assert_close(value, 0.5 * torch.cos(value))
    value.sum().backward()
    assert a.grad is None or not a.grad.any()
    assert not jacrev(call)(torch.ones(2)).any()
    assert not jacfwd(call)(torch.ones(2)).any()
