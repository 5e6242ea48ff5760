"""Ugly fields and bad input, for every solver: an error or a status, in few evaluations, and neighbors unharmed."""

import math

import pytest
import torch
from contracts import assert_close
from torch import nn

from difflayers import Status, UnrolledAdjoint, ode
from difflayers.errors import ProblemError, SolverError
from difflayers.ode import BacksolveAdjoint, Dopri5, ODELayer, odeint

MOST = 20_000  # evaluations
RATES = torch.tensor([[2.0], [1.0], [0.1]], dtype=torch.float64)


def every(**changes):
    """Each solver that there is, and once more with steps of every sample's own where it has them."""
    solvers = []
    for kind in dict.fromkeys(ode.SOLVERS.values()):
        fields = kind.__dataclass_fields__
        limits = {"max_evaluations": 2000, "max_steps": 2000, "step_size": 0.02} | changes
        options = {name: value for name, value in limits.items() if name in fields}
        if "method" in fields:
            options.pop("step_size", None)
        solvers.append(kind(**options))
        if "per_sample" in fields:
            solvers.append(kind(per_sample=True, **options))
    return solvers


def name(solver):
    return type(solver).__name__ + (", per sample" if getattr(solver, "per_sample", False) else "")


def is_fixed(solver):
    return "step_size" in solver.__dataclass_fields__ and "method" not in solver.__dataclass_fields__


def is_alone(solver):
    """Whether no sample has a say in the steps of another."""
    return getattr(solver, "per_sample", False) or is_fixed(solver) or type(solver).__name__ == "ScipyIVP"


SOLVERS = pytest.mark.parametrize("solver", every(), ids=name)


class Counted:
    def __init__(self, fn):
        self.fn, self.count = fn, 0

    def __call__(self, t, y, *args):
        self.count += 1
        return self.fn(t, y, *args)


def broken(kind):
    """Samples of which the ones of ``kind`` 1 to 3 have no solution up to 2."""

    def fn(t, y, kind):
        nan = torch.where(t > 0.6, torch.nan, -y)
        return torch.where(kind == 1, nan, torch.where(kind == 2, y * y, torch.where(kind == 3, torch.nan, -y)))

    return fn, (torch.tensor(kind)[:, None],)


@SOLVERS
def test_neighbors_of_failed_samples(solver):
    t, y0 = torch.tensor([0.0, 0.5, 2.0]), torch.linspace(1, 2, 5)[:, None].requires_grad_()
    fn, args = broken([0, 1, 2, 3, 0])
    counted = Counted(fn)
    solution = odeint(counted, y0, t, args, batch_dims=1, solver=solver, on_failure="ignore")
    assert counted.count < 5 * MOST
    assert solution.ok.tolist() == [True, False, False, False, True]
    assert solution.status[3] == Status.NONFINITE
    assert solution.ys[-1, 1:4].isnan().all()
    fine, args = broken([0] * 5)
    healthy = odeint(fine, y0, t, args, batch_dims=1, solver=solver)
    pairs = solution.ys[:, [0, 4]], healthy.ys[:, [0, 4]]
    if is_alone(solver):
        # Sums over Dopri8's stages for outputs inside a step are rounded as suits the number of samples.
        assert torch.equal(*pairs) or (type(solver).__name__ == "Dopri8" and (pairs[0] - pairs[1]).abs().max() < 1e-14)
        if getattr(solver, "per_sample", False):
            assert solution.stats["steps"][[0, 4]].equal(healthy.stats["steps"][[0, 4]])
    else:
        assert_close(*pairs, 1e-5)
    solution.ys[:, solution.ok].sum().backward()
    assert y0.grad[1:4].tolist() == [[0.0]] * 3
    expected = 1 + math.exp(-0.5) + math.exp(-2)
    # Euler's is that of the discrete solution.
    assert_close(y0.grad[[0, 4]], torch.full((2, 1), expected), 0.02 if is_fixed(solver) else 1e-4)


@SOLVERS
def test_not_a_number_from_the_start(solver):
    for start in (math.nan, math.inf):
        counted = Counted(lambda t, y: -y)
        solution = odeint(counted, torch.tensor([start, 1.0]), [0.0, 1.0], solver=solver, on_failure="ignore")
        assert solution.status == Status.NONFINITE
        assert solution.ys[-1].isnan().all()
        assert counted.count < 1000


@SOLVERS
def test_blow_up(solver):
    counted = Counted(lambda t, y: y * y)
    solution = odeint(counted, torch.ones(1), [0.0, 0.5, 2.0], solver=solver, on_failure="ignore")
    assert not solution.ok
    assert counted.count < MOST
    assert solution.ys[-1].isnan()
    if not is_fixed(solver):
        assert abs(solution.stats["time"] - 1) < 1e-2 or type(solver).__name__ == "TorchDiffEq"


@pytest.mark.parametrize("adjoint", [None, UnrolledAdjoint(), BacksolveAdjoint()], ids=repr)
def test_messages_say_when_and_what_may_be_the_matter(adjoint):
    solve = lambda fn, **options: odeint(fn, torch.ones(3, 1), [0.0, 2.0], (RATES,), batch_dims=1, adjoint=adjoint,  # noqa: E731
                                         solver=Dopri5(per_sample=True, **options))  # fmt: skip
    with pytest.raises(SolverError, match=r"STALLED in 2 of 3 samples \(0, 1\): after t = 0\.5 to 1, .*blow up there"):
        solve(lambda t, y, rate: rate * y * y)
    with pytest.raises(SolverError, match=r"MAX_STEPS in 1 of 1 samples .*after t = 0\.\d+, .*stability .* Rodas"):
        odeint(lambda t, y: -1e6 * (y - torch.cos(t)), torch.ones(1), [0.0, 2.0], solver=Dopri5(max_steps=300))
    with pytest.raises(SolverError, match=r"MAX_STEPS in 2 of 3 samples \(0, 1\): after t = .*raise max_steps"):
        solve(lambda t, y, rate: torch.cos(30 * rate * t), max_steps=60)
    with pytest.raises(
        SolverError, match=r"NONFINITE in 2 of 3 samples \(0, 1\): after t = 0\.5, .*where fn is defined"
    ):
        solve(lambda t, y, rate: torch.where((t > 0.5) & (rate > 0.5), torch.nan, -y))


@SOLVERS
def test_discontinuous_fields(solver):
    jump = Counted(lambda t, y: torch.where(t < 0.5, 1.0, -10.0) * torch.ones_like(y))
    solution = odeint(jump, torch.ones(1), [0.0, 1.0], solver=solver)
    assert jump.count < MOST
    assert abs(solution.ys[-1] + 3.5) < (0.2 if is_fixed(solver) else 1e-3)
    # What slides along a jump has no solution in the classical sense: a status, or a state that stays there.
    slide = Counted(lambda t, y: -torch.sign(y))
    solution = odeint(slide, torch.ones(1), [0.0, 2.0], solver=solver, on_failure="ignore")
    assert slide.count < MOST
    assert not solution.ok or solution.ys[-1].abs() < 0.05


@pytest.mark.parametrize("solver", every(rtol=1e-14, atol=1e-14, max_evaluations=20_000), ids=name)
def test_tolerance_below_rounding(solver):
    y0, t = torch.tensor([1.0, 0.0], dtype=torch.float32), [0.0, 5.0]
    counted = Counted(lambda t, y: torch.stack([y[1], -y[0]]))
    solution = odeint(counted, y0, t, solver=solver)
    assert counted.count < MOST
    assert solution.ys.dtype == torch.float32
    if not is_fixed(solver):
        assert (solution.ys[-1] - torch.tensor([math.cos(5), -math.sin(5)])).abs().max() < 1e-4


@SOLVERS
@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([], "output times"),
        ([0.0, 1.0, 0.5], "increase or decrease"),
        ([0.0, math.nan], "finite"),
        ([0.0, math.inf], "finite"),
    ],
)
def test_bad_times(solver, t, message):
    counted = Counted(lambda t, y: -y)
    with pytest.raises(ProblemError, match=message):
        odeint(counted, torch.ones(2), t, solver=solver)
    assert counted.count == 0


@SOLVERS
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda t, y: y[..., :1], "shape"),
        (lambda t, y: y.float(), "float32"),
        (lambda t, y: y + 0j, "complex"),
        (lambda t, y: (y, y), "structure"),
        (lambda t, y: None, "structure|None|tensor"),
        (lambda t, y: 1.0, "torch operations"),
    ],
)
def test_bad_right_hand_sides(solver, fn, message):
    for batch_dims in (0, 1):
        counted = Counted(fn)
        y0 = torch.ones(3, 2, requires_grad=True)
        with pytest.raises(ProblemError, match=message):
            odeint(counted, y0, [0.0, 1.0], batch_dims=batch_dims, solver=solver)
        assert counted.count == 1


@SOLVERS
def test_right_hand_sides_that_write(solver):
    for batch_dims, tracked in ((0, False), (1, False), (0, True), (1, True)):
        counted = Counted(lambda t, y: y.mul_(-1))
        with pytest.raises(ProblemError, match="in place"):
            odeint(counted, torch.ones(3, 2, requires_grad=tracked), [0.0, 1.0], batch_dims=batch_dims, solver=solver)
        assert counted.count == 1


@SOLVERS
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_fields_that_ignore_things(solver, batch_dims):
    y0, unused = torch.ones(3, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    ys = odeint(lambda t, y, unused: torch.ones_like(y), y0, [0.0, 0.5, 1.0], (unused,), batch_dims=batch_dims,
                solver=solver).ys  # fmt: skip
    assert_close(ys[-1], y0 + 1, 1e-12)
    ys.sum().backward()
    assert_close(y0.grad, torch.full_like(y0, 3.0), 1e-12)
    assert unused.grad is None or not unused.grad.any()
    # Only the parameters matter.
    rate = torch.tensor(2.0, requires_grad=True)
    fn = lambda t, y, rate: rate.expand_as(y)  # noqa: E731
    ys = odeint(fn, torch.ones(3, 2), [0.0, 1.0], (rate,), batch_dims=batch_dims, solver=solver).ys
    (gradient,) = torch.autograd.grad(ys.sum(), rate)
    assert_close(gradient, torch.tensor(6.0), 1e-12)


@SOLVERS
def test_parameters_outside_the_module(solver):
    rate = nn.Parameter(torch.tensor(1.0))

    class Field(nn.Module):
        def forward(self, t, y):
            return -rate * y

    layer = ODELayer(Field(), [0.0, 1.0], solver=solver)
    if isinstance(layer.adjoint, BacksolveAdjoint):
        with pytest.raises(ProblemError, match="pass it as an argument"):
            layer(torch.ones(2))
        return
    layer(torch.ones(2))[-1].sum().backward()
    assert_close(rate.grad, torch.tensor(-2 * math.exp(-1)), 0.02 if is_fixed(solver) else 1e-5)


@pytest.mark.parametrize("solver", every(max_steps=7, max_evaluations=40, rtol=1e-10, atol=1e-10), ids=name)
def test_too_few_steps(solver):
    counted = Counted(lambda t, y: torch.stack([y[..., 1], -y[..., 0]], -1))
    t = torch.linspace(0, 20, 9)
    solution = odeint(counted, torch.ones(2), t, solver=solver, on_failure="ignore")
    assert solution.status == Status.MAX_STEPS
    assert counted.count < 250
    assert solution.ys[-1].isnan().all()
    there = int(solution.stats["outputs"])
    assert solution.ys[:there].isfinite().all()
    if hasattr(solver, "max_steps"):
        assert solution.stats["steps"] == 7


@SOLVERS
def test_exceptions_are_the_users(solver):
    class Mine(Exception):
        pass

    def fn(t, y):
        if t.max() > 0.3:
            raise Mine
        return -y

    with pytest.raises(Mine):
        odeint(fn, torch.ones(2), [0.0, 1.0], solver=solver)


def test_python_numbers_are_not_rounded(monkeypatch):
    torch.set_default_dtype(torch.float32)
    y0 = torch.ones(1, dtype=torch.float64)
    times = [0.0, 0.1, 0.7]
    exact = torch.exp(-torch.tensor(times, dtype=torch.float64))[:, None]
    assert_close(odeint(lambda t, y: -y, y0, times, solver=Dopri5(rtol=1e-12, atol=1e-12)).ys, exact, 1e-11)

    class Decay(nn.Module):
        def forward(self, t, y):
            return -y

    assert_close(ODELayer(Decay(), times, solver=Dopri5(rtol=1e-12, atol=1e-12))(y0), exact, 1e-11)
    assert odeint(lambda t, y: -y, y0.float(), times).ys.dtype == torch.float32
