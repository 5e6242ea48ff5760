"""The continuous adjoint: right where it can be, flagged where it isn't, and nothing but first derivatives."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from difflayers import ImplicitAdjoint, monitor
from difflayers.errors import ConvergenceWarning, ProblemError, SolverError
from difflayers.ode import RK4, BacksolveAdjoint, Dopri5, Dopri8, ODELayer, ScipyIVP, TorchDiffEq, odeint

BEST = Dopri8(rtol=1e-12, atol=1e-12)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SOLVERS = [
    Dopri5(**TIGHT), Dopri5(**TIGHT, per_sample=True), TorchDiffEq("dopri5", **TIGHT), TorchDiffEq("dopri8", **TIGHT),
    ScipyIVP("DOP853", **TIGHT), ScipyIVP("Radau", **TIGHT), ScipyIVP("LSODA", **TIGHT),
]  # fmt: skip
SHARED = [0.0, 0.0, 0.5, 0.5, 1.0]
OWN = [[0.0, 0.3, 0.3, 1.0], [1.0, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, t, y, rate, force):
        return self.net(y) * torch.cos(rate * t) + force


def problem(times, batch_dims=1):
    torch.manual_seed(1)
    fn = Field()
    inputs = [torch.randn(3, 2), torch.tensor(times), torch.tensor(1.3), torch.randn(3, 2)]
    inputs = [x.requires_grad_() for x in inputs]

    def gradients(solver, adjoint=None, on_failure="raise", cut=None):
        y0, t, *args = inputs
        ys = odeint(fn, y0, t, args, batch_dims=batch_dims, solver=solver, adjoint=adjoint, on_failure=on_failure).ys
        weight = torch.arange(ys.numel()).reshape(ys.shape).cos()
        return torch.autograd.grad((weight * ys.sin())[:cut].sum(), [*inputs, *fn.parameters()])

    return gradients


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("times", [SHARED, OWN], ids=["shared", "own"])
def test_gradients_are_those_of_the_discrete_adjoint(solver, times):
    gradients = problem(times)
    ours = gradients(solver, BacksolveAdjoint(**TIGHT))
    torch.testing.assert_close(ours, gradients(BEST), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seminorm", [True, False])
def test_seminorm(seminorm):
    """Without it the integrals have a say, and the solve takes at least as many steps; the gradient is the same."""
    gradients = problem(SHARED)
    found = {}
    for which in (seminorm, True):
        with monitor() as log:
            ours = gradients(Dopri5(**TIGHT), BacksolveAdjoint(1e-7, 1e-12, seminorm=which))
        found[which] = log[-1].steps
        torch.testing.assert_close(ours, gradients(BEST), rtol=1e-4, atol=1e-5)
    assert log[-1].role == "adjoint"
    assert found[seminorm] >= found[True]
    assert seminorm or found[False] > found[True]


def test_default_tolerances_and_a_loss_that_stops_early():
    gradients = problem(SHARED, batch_dims=0)
    torch.testing.assert_close(gradients(TorchDiffEq(), cut=3), gradients(BEST, cut=3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(RK4(0.05), BacksolveAdjoint()), gradients(BEST), rtol=1e-4, atol=1e-5)


def test_complex_trees():
    omega = torch.tensor(2.0, requires_grad=True)
    y0 = {"z": torch.tensor([1.0 + 0.5j], requires_grad=True), "x": torch.randn(2, requires_grad=True)}
    fn = lambda t, y, omega: {"z": 1j * omega * y["z"], "x": -y["x"] * t}  # noqa: E731
    found = []
    for solver in (ScipyIVP("DOP853", **TIGHT), BEST):
        ys = odeint(fn, y0, [0.0, 1.0, 2.0], (omega,), solver=solver).ys
        loss = (ys["z"].real ** 3 + ys["z"].imag).sum() + ys["x"].square().sum()
        found.append(torch.autograd.grad(loss, (omega, *y0.values())))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_layer_trains():
    layer = ODELayer(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), [0.0, 1.0], solver="torchdiffeq")
    layer.fn.forward = lambda t, y: nn.Sequential.forward(layer.fn, y)
    layer(torch.randn(5, 2)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("solver", [TorchDiffEq(**TIGHT), ScipyIVP(**TIGHT), Dopri5(**TIGHT)], ids=repr)
def test_failed_samples_get_no_gradient_and_spoil_none(solver):
    rate = torch.tensor(1.0, requires_grad=True)
    y0 = torch.tensor([[0.5], [math.nan], [2.0]], requires_grad=True)
    fn = lambda t, y, rate: rate * y**2  # noqa: E731
    solution = odeint(fn, y0, [0.0, 0.3, 1.0], (rate,), batch_dims=1, solver=solver, on_failure="ignore")
    loss = solution.ys[-1][solution.ok].sum()
    gradient, along = torch.autograd.grad(loss, (y0, rate))
    torch.testing.assert_close(gradient, torch.tensor([[4.0], [0.0], [0.0]]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(along, torch.tensor(1.0), rtol=1e-6, atol=1e-6)


def lorenz(t, y, p):
    x, u, z = y.unbind(-1)
    return torch.stack([p[0] * (u - x), x * (p[1] - z) - u, x * u - p[2] * z], -1)


def van_der_pol(t, y, p):
    return torch.stack([y[..., 1], p[0] * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def logistic(t, y, p):
    return p[0] * y * (1 - y)


WRONG = {
    "logistic": (logistic, [3.0], [[0.1]], [0.0, 1.0, 10.0], 1e-6, 1e-8),
    "logistic, loose": (logistic, [3.0], [[0.1]], [0.0, 1.0, 10.0], 1e-3, 1e-6),
    "logistic, shorter": (logistic, [3.0], [[0.1]], [0.0, 1.0, 5.0], 1e-3, 1e-6),
    "cubic": (lambda t, y, p: -p[0] * y**3, [20.0], [[1.0]], [0.0, 0.1, 3.0], 1e-3, 1e-6),
    "relaxation": (lambda t, y, p: -p[0] * (y - torch.cos(t)), [30.0], [[2.0]], [0.0, 0.02, 1.0], 1e-3, 1e-6),
    "van der Pol": (van_der_pol, [5.0], [[2.0, 0.0]], [0.0, 2.0, 10.0], 1e-6, 1e-8),
    "Lorenz to 3": (lorenz, [10.0, 28.0, 8 / 3], [[1.0, 1.0, 1.0]], [0.0, 1.0, 3.0], 1e-3, 1e-6),
    "Lorenz to 6": (lorenz, [10.0, 28.0, 8 / 3], [[1.0, 1.0, 1.0]], [0.0, 2.0, 6.0], 1e-6, 1e-8),
}


@pytest.mark.parametrize("kind", ["dopri5", "torchdiffeq", "scipy"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_flagged(name, kind):
    fn, p, y0, t, rtol, atol = WRONG[name]
    solver = {"dopri5": Dopri5, "torchdiffeq": TorchDiffEq, "scipy": ScipyIVP}[kind](rtol=rtol, atol=atol)
    y0, p = torch.tensor(y0, requires_grad=True), torch.tensor(p, requires_grad=True)
    adjoint = BacksolveAdjoint(max_steps=300)
    with pytest.raises(SolverError, match="trajectory parted"):
        odeint(fn, y0, t, (p,), solver=solver, adjoint=adjoint).ys[1:].sum().backward()
    with pytest.warns(ConvergenceWarning, match="CheckpointedAdjoint"):
        odeint(fn, y0, t, (p,), solver=solver, adjoint=adjoint, on_failure="warn").ys[1:].sum().backward()


def test_the_flag_names_samples_and_the_monitor_counts_them():
    y0 = torch.tensor([[0.1], [0.0]], requires_grad=True)
    ys = odeint(logistic, y0, [0.0, 1.0, 10.0], (torch.tensor([3.0]),), batch_dims=1, solver=ScipyIVP()).ys
    with monitor() as log, pytest.raises(SolverError, match=r"1 of 2 samples \(\[0\]\)"):
        ys.sum().backward()
    assert log[-1].status == {"STALLED": 1, "SUCCESS": 1}


def test_only_first_derivatives_in_reverse_mode():
    y0, t = torch.ones(2, requires_grad=True), [0.0, 1.0]
    solve = lambda y0: odeint(lambda t, y: -(y**2), y0, t, solver=TorchDiffEq()).ys[-1].sum()  # noqa: E731
    with pytest.raises(ProblemError, match=r"first derivatives only.*CheckpointedAdjoint"):
        torch.autograd.grad(solve(y0), y0, create_graph=True)
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(ProblemError, match="CheckpointedAdjoint"):
            transform(solve)(torch.ones(2))
    with forward_ad.dual_level(), pytest.raises(ProblemError, match=r"forward mode.*CheckpointedAdjoint"):
        solve(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    hidden = torch.ones(2, requires_grad=True)
    with pytest.raises(ProblemError, match=r"'hidden'.*args"):
        odeint(lambda t, y: -hidden * y, y0, t, solver=TorchDiffEq())


def test_bad_arguments():
    with pytest.raises(TypeError, match="initial value problem"):
        ODELayer(nn.Linear(2, 2), [0.0, 1.0], solver="scipy", adjoint=ImplicitAdjoint())
