"""Mass matrices and differential-algebraic equations: answers, derivatives, consistent starts, what is refused."""

import copy
import pickle

import pytest
import torch
from contracts import assert_close, wanting
from ode_problems import PROBLEMS, RATES, StiffProblem, pendulum, radau, reference, robertson, robertson_dae
from torch import nn
from torch.func import grad, jacfwd, jacrev, vmap

from difflayers import UnrolledAdjoint
from difflayers.errors import ProblemError, SolverError
from difflayers.ode import (
    BacksolveAdjoint,
    CheckpointedAdjoint,
    Dopri8,
    Event,
    Kvaerno5,
    ODELayer,
    Rodas,
    consistent_initial,
    odeint,
)

METHODS = [Rodas, Kvaerno5]
PACES = [False, True]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
every_pace = pytest.mark.parametrize("per_sample", PACES)
SINGULAR = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))


def decay(t, y, rate):
    """``x' = -rate x`` and ``0 = x + cos t - z``."""
    x, z = y.unbind(-1)
    return torch.stack((-rate * x, x + torch.cos(t).reshape(t.shape[:1]) - z), -1)


def decayed(t, rate):
    x = torch.exp(-rate * t)
    return torch.stack((x, x + torch.cos(t)), -1)


@every_pace
@every_method
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.mass is not None], ids=str)
def test_classics(problem: StiffProblem, method, per_sample):
    solver = method(rtol=1e-7, atol=1e-10, per_sample=per_sample)
    solution = odeint(problem.fn, problem.y0[None], problem.t, problem.args, batch_dims=1, solver=solver,
                      mass=problem.mass)  # fmt: skip
    expected = reference(problem.name)
    assert ((solution.ys[:, 0] - expected).abs() / (expected.abs() + 1e-3)).max() < 1e-5
    assert solution.stats["steps"] < 300


@every_method
def test_robertson_as_a_dae_has_the_gradient_of_the_ode(method):
    """Against differences of SciPy's answer, too."""
    y0, t, gradients = torch.tensor([[1.0, 0.0, 0.0]]), [0.0, 40.0], []
    for fn, mass in ((robertson, None), (robertson_dae, torch.diag(torch.tensor([1.0, 1.0, 0.0])))):
        rates = RATES.clone().requires_grad_()
        ys = odeint(fn, y0, t, (rates,), batch_dims=1, solver=method(rtol=1e-8, atol=1e-12), mass=mass).ys
        gradients.append(torch.autograd.grad(ys[-1, 0, 0], rates)[0] * RATES)
    assert_close(*gradients, 1e-7)
    step = torch.tensor([1e-3 * RATES[0], 0, 0])
    up, down = (radau(robertson, y0[0], t, RATES + sign * step)[-1, 0] for sign in (1, -1))
    assert_close(gradients[1][0], (up - down) / 2e-3, 1e-5)


@every_pace
@every_method
def test_pendulum_gradient(method, per_sample):
    """In gravity, through a consistent start, against differences."""
    solver, t = method(rtol=1e-8, atol=1e-8, per_sample=per_sample), [0.0, 0.2]
    mass = torch.diag(torch.tensor([1.0, 1, 1, 1, 0]))

    def end(gravity, speed):
        guess = torch.stack((torch.ones_like(speed), 0 * speed, 0 * speed, speed, 0 * speed))
        y0 = consistent_initial(pendulum, guess, 0.0, (gravity,), mass=mass)
        return odeint(pendulum, y0, t, (gravity,), solver=solver, mass=mass).ys[-1]

    inputs = wanting((torch.tensor(9.81), torch.tensor(0.5)))
    assert torch.autograd.gradcheck(end, inputs, eps=1e-4, atol=1e-4, fast_mode=True)


def field(t, y, A, b):
    return torch.tanh(y @ A.mT) + b * torch.cos(3 * t)


def solved(t, y, A, b, M):
    return torch.linalg.solve(M, field(t, y, A, b).unsqueeze(-1)).squeeze(-1)


def params():
    M = torch.randn(2, 2) + 3 * torch.eye(2)
    return torch.randn(3, 2), torch.randn(2, 2), torch.randn(2), torch.stack([M, 0.9 * M, 1.1 * M])


@every_pace
@every_method
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "batched"])
def test_regular_masses(method, per_sample, shared):
    y0, A, b, M = params()
    inputs = wanting((y0, A, b, M[0] if shared else M, torch.tensor([0.0, 0.3, 1.0])))
    solver = method(rtol=1e-9, atol=1e-9, per_sample=per_sample)

    def ours(y0, A, b, M, t):
        return odeint(field, y0, t, (A, b), batch_dims=1, solver=solver, mass=M).ys

    def theirs(y0, A, b, M, t):
        return odeint(solved, y0, t, (A, b, M), batch_dims=1, solver=Dopri8(rtol=1e-10, atol=1e-10)).ys

    assert_close(ours(*inputs), theirs(*inputs), 1e-7)
    one, two = (torch.autograd.grad(fn(*inputs).pow(3).sum(), inputs) for fn in (ours, theirs))
    assert_close(one, two, 1e-5)


@every_pace
@every_method
@pytest.mark.parametrize("states", [None, 2])
def test_gradient_is_that_of_the_discrete_solution(method, per_sample, states):
    y0, A, b, M = params()
    options = {"newton": 1e-9} if method is Kvaerno5 else {}
    solver = method(rtol=1e-4, atol=1e-4, per_sample=per_sample, **options)
    inputs = wanting((y0, A, b, M, torch.tensor([0.0, 0.3, 1.0])))

    def call(y0, A, b, M, t):
        return odeint(field, y0, t, (A, b), batch_dims=1, solver=solver, mass=M, adjoint=CheckpointedAdjoint(states)).ys

    value = call(*inputs).pow(3).sum()
    taped = torch.autograd.grad(value, inputs, create_graph=True)
    assert_close(torch.autograd.grad(value, inputs), taped, 1e-8)


@every_pace
@every_method
def test_derivatives_of_a_dae(method, per_sample):
    """In rates and output times, in every mode."""
    solver = method(rtol=1e-9, atol=1e-9, per_sample=per_sample)

    def ours(rate, t):
        y0 = torch.tensor([[1.0, 2.0]])
        return odeint(decay, y0, t, (rate,), batch_dims=1, solver=solver, mass=SINGULAR).ys[1:, 0]

    inputs = torch.tensor(2.0), torch.tensor([0.0, 0.1, 0.2])
    exact = lambda rate, t: decayed(t[1:] - t[0], rate) * torch.tensor([1.0, 0]) + torch.stack(  # noqa: E731
        (0 * t[1:], torch.exp(-rate * (t[1:] - t[0])) + torch.cos(t[1:])), -1)  # fmt: skip
    assert_close(ours(*inputs), exact(*inputs), 1e-7)
    leaves = wanting(inputs)
    assert_close(torch.autograd.grad(ours(*leaves).pow(2).sum(), leaves),
                 torch.autograd.grad(exact(*leaves).pow(2).sum(), leaves), 1e-6)  # fmt: skip
    for transform in (jacrev, jacfwd):
        assert_close(transform(ours, (0, 1))(*inputs), transform(exact, (0, 1))(*inputs), 1e-6)
    second = lambda fn: grad(grad(lambda rate: fn(rate, inputs[1]).pow(2).sum()))(inputs[0])  # noqa: E731
    assert_close(second(ours), second(exact), 1e-5)


@pytest.mark.parametrize(("batch_dims", "per_sample"), [(0, False), (1, True)])
@every_method
def test_events_of_a_dae(method, per_sample, batch_dims):
    """When the algebraic number meets a level: ``exp(-rate t) + cos t = 2 cos t + level``."""
    solver = method(rtol=1e-8, atol=1e-8, per_sample=per_sample)
    event = Event(lambda t, y, rate, level: y[..., 1] - 2 * torch.cos(t) - level)
    fn = lambda t, y, rate, level: decay(t, y, rate)  # noqa: E731

    def ours(rate, level):
        y0 = torch.tensor([[1.0, 2.0], [1.0, 2.0]])[slice(None) if batch_dims else 0]
        solution = odeint(fn, y0, [0.0, 0.1, 0.3], (rate, level), batch_dims=batch_dims, solver=solver, mass=SINGULAR,
                          event=event)  # fmt: skip
        return solution.event_t.sum(), solution.event_y.reshape(-1, 2).sum(0), solution.ys[1].reshape(-1, 2).sum(0)

    def exact(rate, level):
        time = torch.tensor(0.2)
        for _ in range(8):  # Newton's method, whose last steps have the derivatives
            x, _ = decayed(time, rate)
            time = time + (x - torch.cos(time) - level) / (rate * x - torch.sin(time))
        samples = 2 if batch_dims else 1
        return samples * time, samples * decayed(time, rate), samples * decayed(torch.tensor(0.1), rate)

    inputs = torch.tensor(2.0), torch.tensor(-0.3)
    assert_close(ours(*inputs), exact(*inputs), 1e-6)
    for transform in (jacrev, jacfwd):
        assert_close(transform(ours, (0, 1))(*inputs), transform(exact, (0, 1))(*inputs), 1e-5)
    second = lambda fn: grad(grad(lambda level: fn(inputs[0], level)[0]))(inputs[1])  # noqa: E731
    assert_close(second(ours), second(exact), 1e-5)
    if not batch_dims:
        rates = torch.tensor([2.0, 1.5])
        assert_close(vmap(ours, (0, None))(rates, inputs[1]), vmap(exact, (0, None))(rates, inputs[1]), 1e-6)


@every_method
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "batched"])
def test_events_with_a_regular_mass(method, shared):
    """Every crossing, with its gradient in the mass, an output time, and the parameter of an event that is a module."""
    y0, A, b, M = params()
    inputs = wanting((y0, A, b, M[0] if shared else M, torch.tensor([0.0, 2.0, 4.0])))
    level = Level()

    def solve(fn, args, solver, **options):
        solution = odeint(fn, y0, inputs[-1], args, batch_dims=1, solver=solver, **options,
                          event=[Event(level, terminal=False), Event(lambda t, y, *args: t - 3)])  # fmt: skip
        assert int(solution.event_count[0].sum()) > 2
        value = torch.nansum(solution.event_t[0]) + torch.nansum(solution.event_y[0] ** 3) + solution.ys[1].sum()
        return value, torch.autograd.grad(value, (*inputs[1:], level.at))

    ours = solve(field, inputs[1:3], method(rtol=1e-9, atol=1e-9), mass=inputs[3])
    theirs = solve(solved, inputs[1:4], Dopri8(rtol=1e-10, atol=1e-10))
    assert_close(ours, theirs, 1e-5)


class Level(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.1))

    def forward(self, t, y, *args):
        return 0.1 * y[:, 0] + torch.sin(3 * t + self.at)


@every_method
def test_vmap(method):
    """Over masses, over arguments, and over both."""
    y0, A, b, M = params()
    solver, t = method(rtol=1e-8, atol=1e-8), [0.0, 0.5]
    ours = lambda A, M: odeint(field, y0, t, (A, b), batch_dims=1, solver=solver, mass=M).ys  # noqa: E731
    theirs = lambda A, M: odeint(solved, y0, t, (A, b, M), batch_dims=1, solver=Dopri8(rtol=1e-9)).ys  # noqa: E731
    many = torch.stack([A, 0.5 * A])
    for dims, args in (((0, None), (many, M)), ((None, 0), (A, M[:2])), ((0, 0), (many, torch.stack([M, 2 * M])))):
        assert_close(vmap(ours, dims)(*args), vmap(theirs, dims)(*args), 1e-5)
        leaves = wanting(args)
        gradients = [torch.autograd.grad(vmap(fn, dims)(*leaves).pow(2).sum(), leaves) for fn in (ours, theirs)]
        assert_close(*gradients, 1e-4)


@every_method
def test_samples_that_have_ended_stand_still(method):
    """Where a step has no length, an algebraic equation must not get lost."""
    rate = torch.tensor([0.1, 1.0, 300.0], requires_grad=True)
    t = torch.tensor([[0.0, 0.1], [0.0, 1.0], [0.0, 2.0]])
    y0 = torch.tensor([[1.0, 2.0]]).expand(3, -1)
    fn = lambda t, y, rate: torch.stack((-rate * y[:, 0], y[:, 0] + torch.cos(t[:, 0]) - y[:, 1]), -1)  # noqa: E731
    solver = method(rtol=1e-8, atol=1e-8, per_sample=True)
    solution = odeint(fn, y0, t, (rate,), batch_dims=1, solver=solver, mass=SINGULAR)
    expected = torch.stack([decayed(t[i, 1], rate[i]) for i in range(3)])
    assert_close(solution.ys[1], expected, 1e-6)
    ours, theirs = (torch.autograd.grad(ys.sum(), rate)[0] for ys in (solution.ys[1], expected))
    assert_close(ours, theirs, 1e-6)


@every_method
def test_unrolled_and_closures(method):
    rate, t, y0 = torch.tensor(2.0, requires_grad=True), [0.0, 1.0], torch.tensor([1.0, 2.0])
    exact = torch.autograd.grad(decayed(torch.tensor(1.0), rate).sum(), rate)
    solver = method(rtol=1e-8, atol=1e-8)
    for fn, args, adjoint in ((decay, (rate,), UnrolledAdjoint()), (lambda t, y: decay(t, y, rate), (), None)):
        ys = odeint(fn, y0, t, args, solver=solver, mass=SINGULAR, adjoint=adjoint).ys
        assert_close(torch.autograd.grad(ys[-1].sum(), rate), exact, 1e-6)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0))

    def forward(self, t, y):
        return decay(t, y, self.rate)


def test_layer():
    y0 = torch.tensor([1.0, 2.0])
    for mass in (SINGULAR, nn.Parameter(SINGULAR.clone())):
        layer = ODELayer(Field(), [0.0, 1.0], solver="rodas", mass=mass)
        ys = layer(y0)
        assert_close(ys[-1], decayed(torch.tensor(1.0), torch.tensor(2.0)), 1e-5)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(y0), ys)
        assert ("mass" in dict(layer.named_parameters())) == isinstance(mass, nn.Parameter)
        ys.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def test_consistent_initial():
    rate, guess = torch.tensor(2.0), torch.tensor([[1.0, 0.0], [3.0, 5.0]])
    found = consistent_initial(decay, guess, 0.0, (rate,), mass=SINGULAR, batch_dims=1)
    assert_close(found, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1e-9)
    regular = consistent_initial(decay, guess, 0.0, (rate,), mass=torch.eye(2), batch_dims=1)
    assert_close(regular, guess, 1e-12)
    circle = lambda t, y, r: torch.stack((-y[..., 1], (y**2).sum(-1) - r * r), -1)  # noqa: E731
    leaves = wanting((torch.tensor([0.6, 1.0]), torch.tensor(1.0)))
    call = lambda y, r: consistent_initial(circle, y, 0.0, (r,), mass=SINGULAR)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    with pytest.raises(SolverError):
        consistent_initial(circle, torch.tensor([2.0, 1.0]), 0.0, (torch.tensor(1.0),), mass=SINGULAR)
    assert isinstance(
        consistent_initial(decay, guess.numpy()[0], 0.0, (2.0,), mass=SINGULAR.numpy()), type(guess.numpy())
    )


@pytest.mark.parametrize("method", METHODS)
def test_bad_input(method):
    y0, t, args = torch.tensor([[1.0, 2.0], [1.0, 2.3]]), [0.0, 1.0], (torch.tensor(2.0),)
    call = lambda mass, y0=y0, fn=decay, **options: odeint(  # noqa: E731
        fn, y0, t, args, batch_dims=1, mass=mass, **{"solver": method()} | options)  # fmt: skip
    with pytest.raises(ProblemError, match=r"1 of 2 samples \(1\): they are 0\.3 away"):
        call(SINGULAR)
    with pytest.raises(ProblemError, match="index 1"):
        call(SINGULAR, fn=lambda t, y, rate: torch.stack((y[:, 1], y[:, 0] - 1), -1))
    with pytest.raises(ProblemError, match=r"\(3, 3\)"):
        call(torch.eye(3))
    with pytest.raises(ProblemError, match="finite"):
        call(torch.eye(2) * torch.nan)
    for other in ("dopri5", "scipy", "torchdiffeq"):
        with pytest.raises(TypeError, match="Rodas"):
            call(SINGULAR, solver=other)
    with pytest.raises(TypeError, match="CheckpointedAdjoint"):
        call(SINGULAR, adjoint=BacksolveAdjoint())
    empty = odeint(decay, torch.zeros(0, 2), t, args, batch_dims=1, solver=method(), mass=SINGULAR)
    assert empty.ys.shape == (2, 0, 2)


@every_pace
@every_method
def test_failed_samples_leave_the_others_alone(method, per_sample):
    when, scale = torch.tensor([[9.0], [0.5]]), torch.ones((), requires_grad=True)

    def fn(t, y, when, scale):
        x, z = y.unbind(-1)
        moving = torch.where(t.reshape(-1) > when[:, 0], torch.nan, -scale * x)
        return torch.stack((moving, x - z), -1)

    solver = method(per_sample=per_sample)
    solution = odeint(fn, torch.ones(2, 2), [0.0, 1.0], (when, scale), batch_dims=1, solver=solver, mass=SINGULAR,
                      on_failure="ignore")  # fmt: skip
    assert solution.status.tolist() == [0, 3]
    assert abs(solution.stats["time"][1] - 0.5) < 0.1
    (slope,) = torch.autograd.grad(solution.ys[-1, 0].sum(), scale)
    assert_close(slope, -2 * torch.exp(torch.tensor(-1.0)), 1e-4)
