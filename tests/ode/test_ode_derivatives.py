"""Derivatives of initial value problems: every order, every mode, every input."""

import itertools
import math

import pytest
import torch
from contracts import assert_close, wanting
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from difflayers import UnrolledAdjoint
from difflayers.errors import ProblemError
from difflayers.ode import (
    RK4,
    BacksolveAdjoint,
    Bosh3,
    CheckpointedAdjoint,
    Dopri5,
    Dopri8,
    Kvaerno5,
    ODELayer,
    Tsit5,
    odeint,
)

TIGHT = [Bosh3(rtol=1e-8, atol=1e-8), *[kind(rtol=1e-11, atol=1e-11) for kind in (Dopri5, Tsit5, Dopri8)]]
SOLVERS = [*TIGHT, RK4(step_size=0.01)]
ADJOINTS = [
    CheckpointedAdjoint(stage_parallel=True),
    CheckpointedAdjoint(stage_parallel=False),
    CheckpointedAdjoint(states=3),
    UnrolledAdjoint(),
]
T = torch.tensor([0.0, 0.3, 0.3, 1.0], dtype=torch.float64)
TRANSFORMED = CheckpointedAdjoint()


def field(t, y, A, b):
    return torch.tanh(y @ A.mT) + b * torch.cos(3 * t)


def params():
    return torch.randn(3, 2), torch.randn(2, 2), torch.randn(2), T.clone()


def layer(solver=TIGHT[1], adjoint=None, batch_dims=0):
    def call(y0, A, b, t=T):
        return odeint(field, y0, t, (A, b), solver=solver, adjoint=adjoint, batch_dims=batch_dims).ys

    return call


def traced(y0, A, b, t=T, steps=100):
    """The same by fixed steps on the graph, with step sizes that follow the times."""
    values, y = [y0], y0
    for start, end in itertools.pairwise(t):
        n = steps if end != start else 1
        h = (end - start) / n
        for k in range(n):
            s = start + k * h
            k1 = field(s, y, A, b)
            k2 = field(s + h / 2, y + h / 2 * k1, A, b)
            k3 = field(s + h / 2, y + h / 2 * k2, A, b)
            k4 = field(s + h, y + h * k3, A, b)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        values.append(y)
    return torch.stack(values)


def cubed(fn):
    return lambda *args: fn(*args).pow(3).sum()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_are_those_of_the_flow(solver, adjoint):
    inputs = wanting(params())
    ours = torch.autograd.grad(cubed(layer(solver, adjoint))(*inputs), inputs)
    assert_close(ours, torch.autograd.grad(cubed(traced)(*inputs), inputs), 1e-6)


@pytest.mark.parametrize("solver", [Dopri5(rtol=1e-3, atol=1e-3), Dopri8(rtol=1e-3), RK4(step_size=0.2)], ids=repr)
@pytest.mark.parametrize("adjoint", ADJOINTS[:3], ids=repr)
def test_gradient_is_that_of_the_discrete_solution(solver, adjoint):
    """To rounding, however large the error of the solution is."""
    inputs = wanting(params()[:3])
    ours = torch.autograd.grad(cubed(layer(solver, adjoint))(*inputs), inputs)
    assert_close(ours, torch.autograd.grad(cubed(layer(solver, UnrolledAdjoint()))(*inputs), inputs), 1e-12)
    twice = torch.autograd.grad(cubed(layer(solver, adjoint))(*inputs), inputs, create_graph=True)
    assert_close(twice, ours, 1e-12)


def test_finite_differences():
    inputs = wanting((*params()[:3], torch.tensor([0.0, 0.3, 1.0])))
    call = layer(Dopri8(rtol=1e-12, atol=1e-12))
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True, atol=1e-6)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-5, fast_mode=True)


def test_transforms():
    """``torch.func``, in every mode and to second order, in every input."""
    inputs = params()
    every = tuple(range(4))
    ours, other = layer(), traced
    assert_close(grad(cubed(ours), every)(*inputs), grad(cubed(other), every)(*inputs), 1e-7)
    assert_close(jvp(ours, inputs, inputs), jvp(other, inputs, inputs), 1e-7)
    assert_close(jacrev(ours, every)(*inputs), jacrev(other, every)(*inputs), 1e-7)
    assert_close(jacfwd(ours, every)(*inputs), jacfwd(other, every)(*inputs), 1e-7)


def test_second_order_transforms():
    inputs, every = params(), (0, 2, 3)
    expected = hessian(cubed(lambda *p: traced(*p, steps=20)), every)(*inputs)
    ours = cubed(layer())
    assert_close(hessian(ours, every)(*inputs), expected, 1e-5)
    assert_close(jacrev(jacrev(ours, every), every)(*inputs), expected, 1e-5)
    assert_close(jacfwd(jacfwd(ours, every), every)(*inputs), expected, 1e-5)
    assert_close(jacrev(jacfwd(ours, every), every)(*inputs), expected, 1e-5)


def test_mixed_transforms():
    """An outer derivative in what the inner one leaves alone."""
    y0, A, b, t = params()
    inner = [grad, lambda fn: lambda *args: jvp(lambda y: fn(y, *args[1:]), (args[0],), (args[0],))[1]]
    for outer in (jacrev, jacfwd):
        for derivative in inner:
            ours, theirs = (
                outer(lambda *args, fn=fn: derivative(cubed(fn))(*args), (1, 3))(y0, A, b, t)  # noqa: B023
                for fn in (layer(), lambda *p: traced(*p, steps=20))
            )
            assert_close(ours, theirs, 1e-5)


def test_vmap():
    y0, A, b, _ = params()
    stacked = torch.stack([A, 0.9 * A])
    dims = (None, 0, None)
    assert_close(vmap(layer(), dims)(y0, stacked, b), vmap(traced, dims)(y0, stacked, b), 1e-8)
    nested = torch.stack([stacked, 0.5 * stacked])
    assert_close(vmap(vmap(layer(), dims), dims)(y0, nested, b), vmap(vmap(traced, dims), dims)(y0, nested, b), 1e-8)
    per_sample = [vmap(grad(cubed(fn), 1), dims)(y0, stacked, b) for fn in (layer(), traced)]
    assert_close(*per_sample, 1e-7)
    moved = stacked.clone().requires_grad_()
    eager = [torch.autograd.grad(vmap(fn, dims)(y0, moved, b).pow(2).sum(), moved) for fn in (layer(), traced)]
    assert_close(*eager, 1e-7)


def test_eager_forward_and_reverse():
    y0, A, b, _ = params()

    def forward_over_reverse(fn):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(A.clone().requires_grad_(), A**2)
            (gradient,) = torch.autograd.grad(fn(y0, dual, b).pow(3).sum(), dual, create_graph=True)
            return forward_ad.unpack_dual(gradient).tangent

    def reverse_over_forward(fn):
        leaf = A.clone().requires_grad_()
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(fn(y0, forward_ad.make_dual(leaf, A**2), b).pow(3).sum()).tangent
            return torch.autograd.grad(moved, leaf)

    flow = lambda *p: traced(*p, steps=20)  # noqa: E731
    assert_close(forward_over_reverse(layer()), forward_over_reverse(flow), 1e-5)
    assert_close(reverse_over_forward(layer()), reverse_over_forward(flow), 1e-5)


def test_third_order():
    inputs = wanting(params()[:3])

    def third(fn):
        (first,) = torch.autograd.grad(fn(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), inputs[2], create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), inputs)

    assert_close(third(layer()), third(lambda *p: traced(*p, steps=40)), 1e-5)


@pytest.mark.parametrize("kind", [Dopri5, Kvaerno5])
def test_a_fifth_derivative_is_right_or_refused(kind):
    """In the rate, which steps of Kvaerno5 don't have; in output times, which nobody has."""
    solver = kind(rtol=1e-9, atol=1e-11)

    def derivatives(variable, value):
        for _ in range(5):
            (value,) = torch.autograd.grad(value, variable, create_graph=True)
            yield value

    rate, t = wanting((torch.tensor(0.5), torch.tensor([0.0, 0.3])))
    ys = odeint(lambda t, y, rate: -rate * y * y, torch.ones(1), t.detach(), (rate,), solver=solver).ys[-1].sum()
    exact = derivatives(rate, 1 / (1 + 0.3 * rate))
    found = derivatives(rate, ys)
    for _ in range(4):
        assert_close(next(found), next(exact), 1e-4)
    if kind is Dopri5:
        assert_close(next(found), next(exact), 1e-4)
    else:
        with pytest.raises(ProblemError, match="Kvaerno5 have derivatives up to order 4"):
            next(found)
    end = t[1:].detach().requires_grad_()
    ys = odeint(lambda t, y: -y * torch.cos(t), torch.ones(1), torch.cat([t[:1], end]), solver=Dopri5()).ys[-1].sum()
    found, exact = derivatives(end, ys), derivatives(end, torch.exp(-torch.sin(end)))
    for _ in range(4):
        assert_close(next(found), next(exact), 1e-5)
    with pytest.raises(ProblemError, match="output times have derivatives up to order 4"):
        next(found)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(2, 2), nn.Parameter(torch.ones(1))

    def forward(self, t, y, scale=1.0):
        return scale * torch.tanh(self.linear(y))


def test_module_parameters():
    model = ODELayer(Module(), [0.0, 1.0], solver=Dopri5(rtol=1e-10, atol=1e-10), batch_dims=1)
    y0 = torch.randn(3, 2)
    model(y0).pow(2).sum().backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    theirs = grad(lambda p: functional_call(model, p, (y0,)).pow(2).sum())(parameters)
    for name, parameter in model.named_parameters():
        if name != "fn.unused":
            assert_close(parameter.grad, theirs[name], 1e-10)
    assert model.fn.unused.grad is None
    samples = vmap(grad(lambda p, y: functional_call(model, p, (y[None],)).pow(2).sum()), (None, 0))(parameters, y0)
    assert_close(samples["fn.linear.weight"].sum(0), theirs["fn.linear.weight"], 1e-7)


def test_closed_over_tensors_are_followed():
    """To every order; they cost the tape of all steps."""
    rate = torch.tensor(0.7, requires_grad=True)
    y0 = torch.ones(2, requires_grad=True)
    scaled = rate * 2
    ys = odeint(lambda t, y: -scaled * y, y0, [0.0, 1.0], solver=TIGHT[1]).ys
    first = torch.autograd.grad(ys[-1].sum(), (rate, y0), create_graph=True)
    assert_close(first[0], torch.tensor(-4 * math.exp(-1.4)), 1e-8)
    assert_close(torch.autograd.grad(first[0], rate), (torch.tensor(8 * math.exp(-1.4)),), 1e-7)
    with pytest.raises(ProblemError, match="closes over"):
        grad(lambda r: odeint(lambda t, y: -r * y, torch.ones(2), [0.0, 1.0]).ys.sum())(torch.tensor(1.0))


def test_right_hand_sides_that_ignore_things():
    y0, a = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    ys = odeint(lambda t, y, a: torch.cos(t).expand_as(y), y0, [0.0, 1.0], (a,)).ys
    ys.sum().backward()
    assert_close(y0.grad, torch.full((2,), 2.0))
    assert a.grad is None or not a.grad.any()
    assert not jacrev(lambda a: odeint(lambda t, y, a: -y, torch.ones(2), [0.0, 1.0], (a,)).ys)(torch.ones(2)).any()
    assert not jacfwd(lambda a: odeint(lambda t, y, a: -y, torch.ones(2), [0.0, 1.0], (a,)).ys)(torch.ones(2)).any()


def test_checkpointing():
    inputs = wanting(params()[:3])
    expected = torch.autograd.grad(layer()(*inputs).pow(2).sum(), inputs)
    for reentrant in (True, False):
        leaves = wanting([p.detach() for p in inputs])
        checkpoint(layer(), *leaves, use_reentrant=reentrant).pow(2).sum().backward()
        assert_close([leaf.grad for leaf in leaves], expected)

    def inside(t, y, A, b):
        return checkpoint(field, t, y, A, b, use_reentrant=False)

    ys = odeint(inside, inputs[0], T, inputs[1:], solver=TIGHT[1]).ys
    assert_close(torch.autograd.grad(ys.pow(2).sum(), inputs), expected)


@pytest.mark.parametrize("adjoint", [*ADJOINTS, BacksolveAdjoint(rtol=1e-11, atol=1e-11)], ids=repr)
def test_field_that_is_itself_a_derivative(adjoint):
    """The gradient of an energy, by torch.func inside of fn."""

    def energy(y, A):
        return 0.5 * ((y @ A) * y).sum() + 0.25 * y.pow(4).sum()

    def descends(t, y, A):
        return -grad(energy)(y, A)

    def by_hand(t, y, A):
        return -0.5 * y @ (A + A.mT) - y**3

    inputs = wanting((torch.randn(3, 2), torch.randn(2, 2)))
    answers = [
        odeint(fn, inputs[0], T, inputs[1:], batch_dims=1, solver=TIGHT[1], adjoint=rule).ys
        for fn, rule in ((descends, adjoint), (by_hand, None))
    ]
    assert_close(*answers)
    assert_close(*(torch.autograd.grad(ys.pow(2).sum(), inputs) for ys in answers))


def test_kept_states_are_bounded():
    from difflayers.ode._mesh import Mesh, Step

    mesh = Mesh(states=4)
    for k in range(103):
        mesh.add(Step(float(k), 1.0, (), torch.zeros(1)))
        assert sum(step.y is not None for step in mesh.steps) <= 5
    assert [len(segment) for segment in mesh.segments] == [32, 32, 32, 7]
    with pytest.raises(ProblemError, match="states"):
        CheckpointedAdjoint(states=0)


def test_no_tape_is_built():
    """What autograd saves doesn't grow with the number of steps."""

    def saved(rtol):
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(Dopri5(rtol=rtol, atol=rtol))(*wanting(params()))
        return count

    assert saved(1e-3) == saved(1e-9)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_stages_in_parallel_are_chosen_where_they_are_faster(batch_dims, monkeypatch):
    import difflayers.ode._gradient as module

    calls, original = [], module.parallel_gradient

    def recorded(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(module, "parallel_gradient", recorded)

    def gradient(samples, adjoint):
        y0 = torch.linspace(-1, 1, 2 * samples).reshape(samples, 2).requires_grad_()
        A = torch.eye(2, requires_grad=True)
        ys = odeint(lambda t, y, A: torch.sin(y @ A), y0, T, (A,), batch_dims=batch_dims, adjoint=adjoint).ys
        return torch.autograd.grad(ys.pow(2).sum(), (y0, A))

    for samples, chosen in ((3, True), (150, False)):
        calls.clear()
        ours = gradient(samples, None)
        assert bool(calls) == chosen
        assert_close(ours, gradient(samples, CheckpointedAdjoint(stage_parallel=not chosen)), 1e-10)


def test_what_cannot_be_vmapped_goes_step_by_step():
    rate, y0 = torch.tensor(0.5, requires_grad=True), torch.ones(2, requires_grad=True)

    def fn(t, y, rate):
        return -rate * y if float(y.detach().sum()) > 0 else y  # reads a value, which vmap forbids

    (gradient,) = torch.autograd.grad(odeint(fn, y0, [0.0, 1.0], (rate,)).ys[-1].sum(), rate)
    assert_close(gradient, torch.tensor(-2 * math.exp(-0.5)), 1e-6)
    with pytest.raises(RuntimeError, match="vmap"):
        odeint(fn, y0, [0.0, 1.0], (rate,), adjoint=CheckpointedAdjoint(stage_parallel=True)).ys.sum().backward()
