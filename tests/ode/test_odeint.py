"""Initial value problems: answers, shapes, what goes in and what comes out."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from difflayers import ImplicitAdjoint, UnrolledAdjoint, monitor, ode
from difflayers.errors import ProblemError
from difflayers.ode import RK4, Bosh3, CheckpointedAdjoint, Dopri5, Dopri8, Euler, Midpoint, ODELayer, Tsit5, odeint

ADAPTIVE = [Bosh3, Dopri5, Tsit5, Dopri8]
FIXED = [(Euler, 1), (Midpoint, 2), (RK4, 4)]
A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)


def linear(t, y, A):
    return y @ A.mT


def exact(y0, t, A=A):
    return torch.stack([y0 @ torch.matrix_exp(A * (s - t[0])).mT for s in t])


def pendulum(t, y):
    return torch.stack([y[..., 1], -torch.sin(y[..., 0]) * torch.cos(t)], -1)


class Field(nn.Module):
    def __init__(self, n=2, hidden=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, n))

    def forward(self, t, y, *args):
        return self.net(y) + sum(args)


@pytest.mark.parametrize("solver", [*ADAPTIVE, *[kind for kind, _ in FIXED]], ids=lambda s: s.__name__)
def test_order_of_convergence(solver):
    """Halving steps that the controller has no say in divides the error by two to the order."""
    from difflayers.ode._stages import Stages

    tableau = solver.tableau

    def error(steps, until=1.0):
        y = torch.tensor([1.0, 0.5])
        stages = Stages(tableau, pendulum, y)
        for k in range(steps):
            t, h = k * until / steps, until / steps
            stages.start(t, y)
            y = stages.attempt(t, y, h)
        return y

    n = {1: 64, 2: 32, 3: 32, 4: 16, 5: 8, 8: 2}[tableau.order]
    best = odeint(pendulum, torch.tensor([1.0, 0.5]), [0.0, 1.0], solver=Dopri8(rtol=1e-14, atol=1e-14)).ys[-1]
    ratio = (error(n) - best).norm() / (error(2 * n) - best).norm()
    assert abs(math.log2(ratio) - tableau.order) < 0.6


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda s: s.__name__)
def test_order_of_interpolant_and_estimate(solver):
    from difflayers.ode._stages import Stages

    tableau, y = solver.tableau, torch.tensor([1.0, 0.5])

    def inside(h):
        stages = Stages(tableau, pendulum, y)
        stages.start(0.0, y)
        stages.attempt(0.0, y, h)
        best = odeint(pendulum, y, [0.0, 0.3 * h], solver=Dopri8(rtol=1e-14, atol=1e-14)).ys[-1]
        return (stages.inside(0.0, y, h, 0.3) - best).norm(), stages.estimates()[0].norm() * h

    h = 0.8 if tableau.order == 8 else 0.05
    (one, first), (two, second) = inside(h), inside(h / 2)
    assert abs(math.log2(one / two) - tableau.interpolant_order - 1) < 0.6
    # DOP853's first estimate is of order 6 in h; the second one, of order 4, makes 8 = 2·6 - 4 of it.
    assert abs(math.log2(first / second) - {8: 6}.get(tableau.order, tableau.error_order)) < 0.6


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda s: s.__name__)
@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_error_is_as_small_as_asked(solver, rtol):
    y0, t = torch.randn(3, 2), torch.linspace(0, 2, 7)
    solution = odeint(linear, y0, t, (A,), solver=solver(rtol=rtol, atol=rtol))
    assert (solution.ys - exact(y0, t)).abs().max() < 20 * rtol
    stats = solution.stats
    assert stats["steps"] == stats["accepted"] + stats["rejected"]
    assert stats["time"] == 2.0


def test_evaluations_are_counted():
    calls = []

    def fn(t, y):
        calls.append(float(t))
        return pendulum(t, y)

    with torch.no_grad():
        for solver in (*[s() for s in ADAPTIVE], RK4(step_size=0.1)):
            calls.clear()
            solution = odeint(fn, torch.ones(2), torch.linspace(0, 3, 20), solver=solver)
            assert solution.stats["evaluations"] == len(calls)
            assert max(calls) <= 3


def test_decreasing_times():
    t = torch.tensor([2.0, 1.5, 0.0])
    y0 = torch.randn(2)
    assert (odeint(linear, y0, t, (A,), solver=Dopri8(rtol=1e-10, atol=1e-10)).ys - exact(y0, t)).abs().max() < 1e-8


@pytest.mark.parametrize("solver", [Dopri5(), RK4(step_size=0.05)], ids=repr)
@pytest.mark.parametrize("times", [[0.0], [0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 1.0]])
def test_equal_times(solver, times):
    t, y0 = torch.tensor(times), torch.randn(2, requires_grad=True)
    solution = odeint(linear, y0, t, (A,), solver=solver)
    torch.testing.assert_close(solution.ys, exact(y0, t), rtol=1e-5, atol=1e-5)
    assert torch.equal(solution.ys[0], y0)
    torch.testing.assert_close(
        torch.autograd.grad(solution.ys.sum(), y0), torch.autograd.grad(exact(y0, t).sum(), y0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([], "output times"),
        (0.5, "output times"),
        ([0.0, 1.0, 0.5], "increase or decrease"),
        ([0.0, math.nan], "finite"),
        (torch.zeros(2, 3), r"\(2, 3\)"),
        ([0j, 1j], "complex"),
    ],
)
def test_bad_times(t, message):
    with pytest.raises(ProblemError, match=message):
        odeint(lambda t, y: -y, torch.ones(2), t)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda t, y: y[:1], "shape"),
        (lambda t, y: y.float(), "float32"),
        (lambda t, y: (y, y), "structure"),
        (lambda t, y: 1.0, "torch operations"),
        (lambda t, y: y.mul_(-1), "in place"),
    ],
)
def test_bad_right_hand_sides(fn, message):
    with pytest.raises(ProblemError, match=message):
        odeint(fn, torch.ones(2), [0.0, 1.0])


def test_bad_arguments():
    y0, t = torch.ones(3, 2), [0.0, 1.0]
    with pytest.raises(ProblemError, match="did you mean 'dopri5'"):
        odeint(linear, y0, t, (A,), solver="dopri55")
    with pytest.raises(ProblemError, match="independent"):
        odeint(lambda t, y: -y.mean(0, keepdim=True).expand_as(y), y0, t, batch_dims=1)
    with pytest.raises(ProblemError, match="int64"):
        odeint(linear, torch.ones(2, dtype=torch.int64), t, (A,))
    with pytest.raises(TypeError, match="CheckpointedAdjoint"):
        odeint(linear, y0, t, (A,), adjoint=ImplicitAdjoint())
    with pytest.raises(ProblemError, match="an nn"):
        ODELayer(linear, t)


def test_complex_oscillator():
    omega = torch.tensor(2.0, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j], requires_grad=True)
    t = torch.linspace(0, 3, 4)
    ys = odeint(lambda t, y, omega: 1j * omega * y, y0, t, (omega,), solver=Dopri5(rtol=1e-10, atol=1e-10)).ys
    closed = torch.exp(1j * omega * t)[:, None] * y0
    torch.testing.assert_close(ys, closed, rtol=1e-8, atol=1e-8)
    loss = lambda ys: (ys.real**3 + ys.imag).sum()  # noqa: E731
    ours, theirs = (torch.autograd.grad(loss(v), (y0, omega)) for v in (ys, closed))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_trees():
    y0 = {"x": torch.randn(3, 2), "z": torch.randn(3, dtype=torch.complex128)}
    t = torch.linspace(0, 1, 3)
    args = ({"rate": torch.tensor(0.5, requires_grad=True), "name": "decay"},)

    def fn(t, y, args):
        return {"x": -args["rate"] * y["x"], "z": 1j * y["z"]}

    for batch_dims in (0, 1):
        ys = odeint(fn, y0, t, args, batch_dims=batch_dims, solver=Dopri5(rtol=1e-9, atol=1e-9)).ys
        assert ys["x"].shape == (3, 3, 2)
        torch.testing.assert_close(ys["z"], torch.exp(1j * t)[:, None] * y0["z"], rtol=1e-7, atol=1e-7)
        (gradient,) = torch.autograd.grad(ys["x"][-1].sum(), args[0]["rate"])
        torch.testing.assert_close(gradient, -math.exp(-0.5) * y0["x"].sum(), rtol=1e-6, atol=1e-6)


def test_numpy_in_and_out():
    y0, t = np.array([1.0, 2.0], dtype=np.float32), np.array([0.0, 1.0])
    solution = odeint(lambda t, y, a: -a * y, y0, t, (np.array(1.0),))
    assert isinstance(solution.ys, np.ndarray)
    assert isinstance(solution.t, np.ndarray)
    assert solution.ys.dtype == np.float32
    np.testing.assert_allclose(solution.ys[-1], y0 * math.exp(-1), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    field = Field().to(dtype)
    y0 = torch.randn(3, 2, dtype=dtype)
    ys = ODELayer(field, [0.0, 1.0])(y0)
    assert ys.dtype == dtype
    ys.sum().backward()
    assert all(p.grad.dtype == dtype for p in field.parameters())


def test_no_samples():
    field = Field()
    for solver in (Dopri5(), RK4()):
        ys = ODELayer(field, [0.0, 1.0], batch_dims=1, solver=solver)(torch.zeros(0, 2))
        assert ys.shape == (2, 0, 2)
        ys.sum().backward()


def test_tolerance_below_rounding_ends():
    solution = odeint(
        lambda t, y: torch.stack([y[1], -y[0]]),
        torch.tensor([1.0, 0.0], dtype=torch.float32),
        [0.0, 10.0],
        solver=Dopri5(rtol=1e-12, atol=1e-12),
    )
    assert solution.stats["evaluations"] < 3000
    assert (solution.ys[-1] - torch.tensor([math.cos(10), -math.sin(10)])).abs().max() < 1e-4


def test_max_steps():
    solution = odeint(linear, torch.ones(2), torch.linspace(0, 9, 10), (A,), solver=Dopri5(max_steps=9),
                      on_failure="ignore")  # fmt: skip
    assert solution.status == 1
    assert solution.stats["steps"] == 9
    there = int(solution.stats["outputs"])
    assert 0 < there < 10
    assert solution.ys[:there].isfinite().all()
    assert solution.ys[there:].isnan().all()
    assert solution.stats["time"] < 9


def test_blow_up_stalls():
    solution = odeint(lambda t, y: y * y, torch.ones(1), [0.0, 0.5, 2.0], on_failure="ignore")
    assert solution.status == 2
    assert abs(solution.stats["time"] - 1) < 1e-6
    assert solution.stats["evaluations"] < 3000
    assert abs(solution.ys[1] - 2) < 1e-4
    assert solution.ys[2].isnan()


def test_sliding_stalls():
    solution = odeint(lambda t, y: -torch.sign(y), torch.ones(1), [0.0, 0.5, 2.0], on_failure="ignore")
    assert solution.status == 2
    assert abs(solution.stats["time"] - 1) < 1e-3
    assert solution.stats["evaluations"] < 20000


def test_jump_is_passed():
    solution = odeint(lambda t, y: torch.where(t < 0.5, 1.0, -10.0).expand_as(y), torch.ones(1), [0.0, 1.0])
    assert abs(solution.ys[-1] + 3.5) < 1e-4  # an estimate that assumes smoothness misses a part of a jump


def nan_after(t, y, when):
    return torch.where(t.expand_as(y) > when, torch.nan, -y)


@pytest.mark.parametrize("adjoint", [CheckpointedAdjoint(), UnrolledAdjoint()], ids=repr)
def test_one_sample_becomes_nan(adjoint):
    y0, rate = torch.ones(3, 2, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    when = torch.tensor([[9.0], [0.5], [9.0]])
    t = torch.linspace(0, 1, 5)
    solution = odeint(lambda t, y, when, rate: rate * nan_after(t, y, when), y0, t, (when, rate), batch_dims=1,
                      on_failure="ignore", adjoint=adjoint)  # fmt: skip
    assert solution.status.tolist() == [0, 3, 0]
    assert abs(solution.stats["time"][1] - 0.5) < 1e-6
    healthy = torch.exp(-t)[:, None].expand(5, 2)
    torch.testing.assert_close(solution.ys[:, 0], healthy, rtol=1e-5, atol=1e-5)
    assert solution.ys[4, 1].isnan().all()
    if isinstance(adjoint, CheckpointedAdjoint):
        torch.testing.assert_close(solution.ys[:2, 1], healthy[:2], rtol=1e-5, atol=1e-5)
    solution.ys[:, solution.ok].sum().backward()
    assert y0.grad[1].tolist() == [0, 0]
    torch.testing.assert_close(rate.grad, -4 * (t * torch.exp(-t)).sum(), rtol=1e-5, atol=1e-5)


def test_nan_at_once():
    solution = odeint(lambda t, y: y * torch.nan, torch.ones(2), [0.0, 1.0], on_failure="ignore")
    assert solution.status == 3
    assert solution.stats["time"] == 0
    assert solution.stats["evaluations"] < 500
    solution = odeint(lambda t, y: y / 0, torch.ones(2), [0.0, 1.0], on_failure="ignore", solver=RK4(step_size=0.1))
    assert solution.status == 3


def test_layer():
    layer = ODELayer(Field(), torch.linspace(0, 1, 3), batch_dims=1)
    y0 = torch.randn(4, 2)
    expected = layer(y0, 0.5)
    assert expected.shape == (3, 4, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(y0, 0.5), expected)
    fresh = ODELayer(Field(), torch.linspace(0, 1, 3), batch_dims=1)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(y0, 0.5), expected)
    assert "Dopri5" in repr(layer)
    assert layer.solve(y0).status.shape == (4,)
    assert set(layer.state_dict()) == {f"fn.{name}" for name in layer.fn.state_dict()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_model_is_the_eager_one():
    layer = ODELayer(Field(), [0.0, 1.0])
    model = nn.Sequential(nn.Linear(2, 2), layer)
    y0 = torch.randn(3, 2)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(y0), model(y0))
    gradients = [torch.autograd.grad(m(y0)[-1].sum(), list(model.parameters())) for m in (model, compiled)]
    torch.testing.assert_close(*gradients)


def test_monitor_records_the_solve():
    with monitor() as log:
        solution = odeint(linear, torch.ones(2), [0.0, 1.0], (A,))
    assert log[0].role == "forward"
    assert log[0].steps == solution.stats["steps"]
    assert log[0].evaluations == solution.stats["evaluations"]


def test_autocast():
    field = Field().float()
    y0 = torch.randn(4, 2, dtype=torch.float32)
    layer = ODELayer(field, [0.0, 1.0], solver=Dopri5(rtol=1e-2, atol=1e-2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(y0)
    half.sum().backward()
    assert half.dtype == torch.float32
    assert not torch.equal(half, layer(y0))
    torch.testing.assert_close(half, layer(y0), rtol=0.05, atol=0.05)


def test_names():
    names = {"bosh3", "dopri5", "dopri8", "euler", "kvaerno5", "midpoint", "rk4", "rodas", "tsit5"}
    assert names | {"scipy", "torchdiffeq"} <= set(ode.SOLVERS)


def test_complex_numbers_behind_an_odd_number_of_reals():
    y0 = {"x": torch.randn(2, 3, requires_grad=True), "z": torch.randn(2, dtype=torch.complex128, requires_grad=True)}
    for batch_dims in (0, 1):
        ys = odeint(lambda t, y: {"x": -y["x"], "z": 1j * y["z"]}, y0, [0.0, 1.0], batch_dims=batch_dims).ys
        torch.testing.assert_close(ys["z"][-1], y0["z"] * complex(math.cos(1), math.sin(1)), rtol=1e-5, atol=1e-5)
        x, z = torch.autograd.grad(ys["x"][-1].sum() + ys["z"][-1].real.sum(), (y0["x"], y0["z"]))
        torch.testing.assert_close(x, torch.full_like(x, math.exp(-1)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(z, torch.full_like(z, complex(math.cos(1), -math.sin(1))), rtol=1e-5, atol=1e-5)
