"""Gradients whose error is told: ``CheckpointedAdjoint(check=...)``."""

import functools
import warnings

import pytest
import torch

from difflayers import monitor
from difflayers.errors import ConvergenceWarning, ProblemError, SolverError
from difflayers.ode import RK4, CheckpointedAdjoint, Dopri5, Dopri8, Rodas, odeint


def cubic(t, y, p):
    return -p[0] * y**3


def oscillator(t, y, p):
    return torch.stack([y[..., 1], p[0] * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def lorenz(t, y, p):
    a, b, c = y.unbind(-1)
    return torch.stack([p[0] * (b - a), a * (p[1] - c) - b, a * b - p[2] * c], -1)


CASES = {
    "cubic": (cubic, (20.0,), (1.0,), 1.0),
    "oscillator": (oscillator, (5.0,), (2.0, 0.0), 10.0),
    "lorenz": (lorenz, (10.0, 28.0, 8 / 3), (1.0, 1.0, 1.0), 6.0),
}


def gradient(name, solver, adjoint=None, **options):
    fn, p, y0, end = CASES[name]
    y0, p = torch.tensor([y0], requires_grad=True), torch.tensor(p, requires_grad=True)
    ys = odeint(fn, y0, [0.0, end], (p,), batch_dims=1, solver=solver, adjoint=adjoint, **options).ys
    weights = torch.arange(1.0, 1 + y0.shape[1])
    return torch.cat([one.reshape(-1) for one in torch.autograd.grad((ys[-1] * weights).sum(), (y0, p))])


@functools.cache
def exact(name):
    return gradient(name, Dopri8(rtol=1e-13, atol=1e-13, max_steps=100_000))


def flagged(name, solver, check):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradient(name, solver, CheckpointedAdjoint(check=check), on_failure="warn")
    return found, any(issubclass(one.category, ConvergenceWarning) for one in caught)


GRID = [(kind, rtol) for kind in (Dopri5, Dopri8, Rodas) for rtol in (1e-2, 1e-4, 1e-6, 1e-8)][:-2]


@pytest.mark.parametrize(("kind", "rtol"), GRID)
@pytest.mark.parametrize("name", CASES)
def test_right_or_flagged(name, kind, rtol):
    found, told = flagged(name, kind(rtol=rtol, atol=rtol), 10 * rtol)
    error = (found - exact(name)).norm() / exact(name).norm()
    assert told or error <= 10 * rtol, f"{error:.1e}"


def test_a_loose_one_is_flagged_and_a_tight_one_is_not():
    for name in CASES:
        assert flagged(name, Dopri5(rtol=1e-2, atol=1e-2), 1e-3)[1]
        found, told = flagged(name, Dopri5(rtol=1e-10, atol=1e-10), 1e-3)
        assert not told
        assert (found - exact(name)).norm() <= 1e-3 * exact(name).norm()


@pytest.mark.parametrize(
    "solver", [Dopri5(rtol=1e-2, atol=1e-2), Dopri5(rtol=1e-2, atol=1e-2, per_sample=True)], ids=repr
)
def test_which_samples(solver):
    y0 = torch.tensor([[1e-3], [3.0]], requires_grad=True)
    rule = CheckpointedAdjoint(check=0.05)
    ys = odeint(lambda t, y: -20 * y**3, y0, [0.0, 1.0], batch_dims=1, solver=solver, adjoint=rule).ys
    with monitor() as log, pytest.raises(SolverError, match=r"1 of 2 samples \(\[1\]\)"):
        ys[-1].sum().backward()
    # The tighter solve, and what came of the comparison.
    assert [record.role for record in log] == ["forward", "adjoint"]


def test_refused_where_it_says_nothing():
    y0, rate = torch.ones(1, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    checked = CheckpointedAdjoint(check=1e-3)
    with pytest.raises(TypeError, match="fixed step"):
        odeint(lambda t, y: -y, y0, [0.0, 1.0], solver=RK4(0.1), adjoint=checked)
    with pytest.raises(ProblemError, match="check="):
        odeint(lambda t, y: -rate * y, y0, [0.0, 1.0], adjoint=checked)
    with pytest.raises(ProblemError, match="check="):
        odeint(lambda t, y: -y, y0, [0.0, 1.0], adjoint=checked, event=lambda t, y: y - 0.5)
