"""What every solver and adjoint promises, one function a promise."""

import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from difflayers.fixedpoint import fixed_point


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
        assert torch.autograd.gradgradcheck(call, params, check_batched_grad=True)
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
