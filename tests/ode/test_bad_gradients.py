"""Gradients that are easy to get wrong: damped, unstable, stiff and chaotic systems, and no solution at all.

``benchmarks/ode.py --only gradients`` has twenty of them.
"""

import math
from functools import partial

import pytest
import torch

from difflayers import UnrolledAdjoint
from difflayers.errors import ConvergenceWarning, SolverError
from difflayers.ode import (
    BacksolveAdjoint,
    Bosh3,
    CheckpointedAdjoint,
    Dopri5,
    Dopri8,
    Kvaerno5,
    Rodas,
    ScipyIVP,
    TorchDiffEq,
    Tsit5,
    odeint,
)

DISCRETE = [CheckpointedAdjoint(), CheckpointedAdjoint(states=4), CheckpointedAdjoint(stage_parallel=False),
            UnrolledAdjoint()]  # fmt: skip
STIFF = [Rodas, Kvaerno5]
KINDS = [Bosh3, Dopri5, Tsit5, Dopri8, *STIFF]


def logistic(t, y, p):
    return p * y * (1 - y)


def logistic_closed(t, y, p):
    grown = y * torch.exp(p * t)
    return grown / (1 - y + grown)


def cubic(t, y, p):
    return -p * y**3


def cubic_closed(t, y, p):
    return y / (1 + 2 * p * y * y * t).sqrt()


def relaxation(t, y, p):
    return -p * (y - torch.cos(t))


def relaxation_closed(t, y, p):
    curve = lambda t: (p * p * torch.cos(t) + p * torch.sin(t)) / (1 + p * p)  # noqa: E731
    return curve(t) + (y - curve(torch.zeros(()))) * torch.exp(-p * t)


def repelled(t, y, p):
    return p * (y - torch.cos(t)) - torch.sin(t)


def repelled_closed(t, y, p):
    return torch.cos(t) + (y - 1) * torch.exp(p * t)


def squared(t, y, p):
    return p * y * y


def squared_closed(t, y, p):
    return y / (1 - p * y * t)


def lorenz(t, y, p):
    x, u, z = y.unbind(-1)
    return torch.stack([p[..., 0] * (u - x), x * (p[..., 1] - z) - u, x * u - p[..., 2] * z], -1)


def van_der_pol(t, y, p):
    x, v = y.unbind(-1)
    return torch.stack([v, p[..., 0] * (1 - x * x) * v - x], -1)


CLOSED = {
    "logistic": (logistic, logistic_closed, 3.0, 0.1, [0.0, 1.0, 10.0]),
    "cubic": (cubic, cubic_closed, 20.0, 1.0, [0.0, 0.1, 3.0]),
    "relaxation": (relaxation, relaxation_closed, 30.0, 2.0, [0.0, 0.02, 1.0]),
    "stiff relaxation": (relaxation, relaxation_closed, 1e4, 2.0, [0.0, 1e-4, 0.3]),
    "repelled": (repelled, repelled_closed, 5.0, 1.001, [0.0, 1.0, 3.0]),
    "before a blow-up": (squared, squared_closed, 1.0, 1.0, [0.0, 0.5, 0.99]),
}


def leaves(p, y0):
    return torch.tensor([[y0]], requires_grad=True), torch.tensor(p, requires_grad=True)


def deviation(name, solver):
    """The largest relative error of the solution."""
    fn, closed, p, y0, t = CLOSED[name]
    ys = odeint(fn, torch.tensor([[y0]]), t, (p,), batch_dims=1, solver=solver).ys[1:].flatten()
    true = torch.stack([closed(torch.tensor(s), torch.tensor(y0), torch.tensor(p)) for s in t[1:]])
    return float((ys / true - 1).abs().max())


def gradient(name, solver, adjoint=None):
    fn, _, p, y0, t = CLOSED[name]
    inputs = leaves(p, y0)
    ys = odeint(fn, inputs[0], t, inputs[1:], batch_dims=1, solver=solver, adjoint=adjoint).ys
    return torch.stack([g.reshape(()) for g in torch.autograd.grad(ys[1:].sum(), inputs)])


def error(name, found):
    """The larger relative error of the two numbers, by start and rate."""
    _, closed, p, y0, t = CLOSED[name]
    inputs = leaves(p, y0)
    total = sum(closed(torch.tensor(s), *inputs).sum() for s in t[1:])
    true = torch.stack([g.reshape(()) for g in torch.autograd.grad(total, inputs)])
    return float(((found - true) / true).abs().max())


def within(name, rtol, adjoint, solver):
    """Whether the gradient is within ten tolerances, or flagged."""
    try:
        return error(name, gradient(name, solver, adjoint)) <= 10 * rtol
    except (SolverError, ConvergenceWarning):
        return True


@pytest.mark.parametrize("name", ["logistic", "relaxation"])
@pytest.mark.parametrize("kind", [Dopri8, Rodas])
def test_damped(kind, name):
    """The solution is within two tolerances, its gradient as many times further off as its error goes with the rate.

    That of a step goes with the power ``order + 1`` of the rate, hence its relative derivative is so many times larger;
    what has grown like ``exp(rate · t)`` since, ``rate · t = 3`` times more; the solution itself goes less with it than
    with its power one. ``check=`` tells, where that is too much.
    """
    for rtol, per_sample in ((1e-6, True), (1e-9, False)):
        solver = kind(rtol=rtol, atol=rtol / 100, per_sample=per_sample)
        assert deviation(name, solver) < 2 * rtol
        assert error(name, gradient(name, solver)) < 2.5 * (solver.tableau.order + 1 + 3) * rtol
        assert within(name, rtol, CheckpointedAdjoint(check=5 * rtol), solver)
        assert within(name, rtol, BacksolveAdjoint(), solver)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize(
    "solver", [TorchDiffEq, ScipyIVP, partial(ScipyIVP, "LSODA")], ids=["torchdiffeq", "RK45", "LSODA"]
)
def test_continuous_adjoints_of_other_solvers(solver, name):
    """Unless the problem itself multiplies errors, as away from a curve or before a blow-up."""
    gain = {"repelled": math.exp(5 * 3), "before a blow-up": 1 / (1 - 0.99) ** 2}.get(name, 1.0)
    assert within(name, gain * 1e-6, None, solver(rtol=1e-6, atol=1e-8))


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_follow_the_tolerance(kind, name):
    """What is wrong at a loose tolerance is right at a tight one, where the method can have that."""
    if name == "stiff relaxation" and kind not in STIFF:
        pytest.skip("see test_explicit_steps_at_the_border_of_stability")
    tight = 1e-10 if kind in (Bosh3, *STIFF) else 1e-11
    solver = kind(rtol=tight, atol=tight / 100)
    assert error(name, gradient(name, solver)) < 1e-5


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", [Bosh3, Dopri5, Tsit5, Dopri8])
def test_explicit_steps_at_the_border_of_stability(kind, per_sample):
    """The tangent of a step grows where the solution doesn't: that can't be right, and is told."""
    solver = kind(rtol=1e-6, atol=1e-8, per_sample=per_sample)
    with pytest.warns(ConvergenceWarning, match="stiff: .* Rodas"):
        found = gradient("stiff relaxation", solver)
    assert error("stiff relaxation", found) > 10 * solver.rtol
    fn, _, p, y0, t = CLOSED["stiff relaxation"]
    rates, start = torch.tensor([[p], [1.0]]), torch.full((2, 1), y0)
    stats = odeint(fn, start, t, (rates,), batch_dims=1, solver=solver).stats
    assert stats["stiff"][0] > 0.9 * stats["accepted"][0]
    assert stats["stiff"][1] == 0


@pytest.mark.parametrize("per_sample", [False, True])
def test_unrolled_gradients_tell_of_stiffness_too(per_sample):
    """In ``backward``, or where no hook can: at once; not without a gradient, and not where failures are ignored."""
    fn, solver = CLOSED["stiff relaxation"][0], Dopri5(per_sample=per_sample)
    start = torch.tensor([[2.0]], requires_grad=True)

    def solve(y, on_failure="raise"):
        return odeint(fn, y, [0.0, 0.1], (torch.tensor(1e4),), batch_dims=1, solver=solver, adjoint=UnrolledAdjoint(),
                      on_failure=on_failure).ys[-1].sum()  # fmt: skip

    solve(start.detach())
    value = solve(start)
    with pytest.warns(ConvergenceWarning, match="stiff: .* Rodas"):
        value.backward()
    with pytest.warns(ConvergenceWarning, match="stiff: .* Rodas"):
        torch.func.grad(solve)(start.detach())
    solve(start, "ignore").backward()


@pytest.mark.parametrize("kind", KINDS)
def test_stiffness_is_not_told_where_accuracy_rules(kind):
    for name in ("logistic", "cubic", "repelled", "before a blow-up"):
        fn, _, p, y0, t = CLOSED[name]
        stats = odeint(fn, torch.tensor([[y0]]), t, (p,), batch_dims=1, solver=kind()).stats
        assert stats["stiff"] <= 20


@pytest.mark.parametrize("adjoint", DISCRETE[1:], ids=repr)
@pytest.mark.parametrize("name", ["cubic", "repelled"])
@pytest.mark.parametrize("kind", [Dopri5, Rodas])
def test_discrete_adjoints_agree_however_wrong(kind, name, adjoint):
    """Whichever way it is computed, it is the gradient of the same numbers."""
    solver = kind(rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradient(name, solver, adjoint), gradient(name, solver), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, TorchDiffEq, ScipyIVP])
def test_beyond_a_blow_up(kind):
    with pytest.raises(SolverError):
        odeint(squared, torch.ones(1, requires_grad=True), [0.0, 0.5, 2.0], (torch.tensor(1.0),), solver=kind())


@pytest.mark.parametrize(
    ("fn", "p", "y0", "t"),
    [
        (lorenz, [10.0, 28.0, 8 / 3], [1.0, 1.0, 1.0], [0.0, 2.0, 6.0]),
        (van_der_pol, [5.0], [2.0, 0.0], [0.0, 2.0, 10.0]),
    ],
    ids=["lorenz", "van_der_pol"],
)
def test_chaos_and_relaxation_oscillations(fn, p, y0, t):
    torchdiffeq = pytest.importorskip("torchdiffeq")

    def found(solve):
        start, rates = torch.tensor(y0, requires_grad=True), torch.tensor(p, requires_grad=True)
        return torch.cat(torch.autograd.grad(solve(start, rates)[1:].sum(), (start, rates)))

    def tape(start, rates):
        first = torchdiffeq.odeint(lambda t, y: fn(t, y, rates), start, torch.tensor(t[:2]), rtol=1e-12, atol=1e-13,
                                   method="dopri8")  # fmt: skip
        last = torchdiffeq.odeint(lambda t, y: fn(t, y, rates), first[-1], torch.tensor(t[1:]), rtol=1e-12, atol=1e-13,
                                  method="dopri8")  # fmt: skip
        return torch.stack([start, first[-1], last[-1]])

    true = found(tape)
    for kind in (Dopri5, Tsit5, Dopri8):
        solver = kind(rtol=1e-10, atol=1e-12)
        ours = found(lambda start, rates, solver=solver: odeint(fn, start, t, (rates,), solver=solver).ys)
        assert (ours - true).norm() / true.norm() < 1e-6
